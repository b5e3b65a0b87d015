# An MLNode image with proof of compute. Build it in the root of the checkout, with the image that the host runs:
#   docker build --file docker/mlnode.Dockerfile --build-arg MLNODE_IMAGE=IMAGE:TAG --tag mlnode-gonka-poc .
# Where the build has no index, make the packages first, with a Python of the image's minor version:
#   bash scripts/bundle.sh --out wheels
# and add --build-arg WHEELS=wheels.
ARG MLNODE_IMAGE
FROM ${MLNODE_IMAGE}

ARG WHEELS=
# an image has no driver, so its GPUs are named: universal, or b300
ARG GPUS=universal
COPY . /opt/gonka_poc_checkout
WORKDIR /opt/gonka_poc_checkout
RUN bash install.sh --yes --keep-vllm --gpus "${GPUS}" ${WHEELS:+--wheels "${WHEELS}"}
# where MLNode's own image starts
WORKDIR /app
