#!/bin/sh
# Starts vLLM's server with proof of compute. The token is read from a file, where there is one: a secret of the container.
set -eu

token_file=${TOKEN_FILE:-/run/secrets/poc_api_token}
if [ -e "$token_file" ]; then
    POC_API_TOKEN=$(cat "$token_file")
    export POC_API_TOKEN
fi
exec "${PYTHON:-python3}" -m gonka_poc.serve "$@" --enable-poc
