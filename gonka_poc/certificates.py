"""Certificates of other servers: the authorities that callbacks and the command line trust."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

import httpx

from gonka_poc.errors import SettingsError

# OpenSSL's own names first, then those of requests and curl; the first that is set counts
VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def ssl_context(environ: Mapping[str, str] = os.environ) -> ssl.SSLContext:
    """A context for clients that trusts the authorities of the first of VARIABLES that is set (a file or a folder),
    and without any those that httpx brings. Raises SettingsError naming a variable that cannot be used."""
    for name in VARIABLES:
        path = environ.get(name)
        if not path:
            continue
        try:
            if os.path.isdir(path):
                return ssl.create_default_context(capath=path)
            return ssl.create_default_context(cafile=path)
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(
                f"{name}={path!r} holds no certificates that can be read ({error}); set it to a file in PEM form or to "
                "a folder with hashed names (`openssl rehash`), or unset it"
            ) from error
    return httpx.create_ssl_context(trust_env=False)
