"""Who to be on a server, and whom to believe that it is that server: by the environment, so that nothing stands in a list of processes.

`NEO4J_USERNAME`, `NEO4J_PASSWORD` or the file `NEO4J_PASSWORD_FILE`, `NEO4J_DATABASE`; `NEO4J_CA_CERTIFICATE` is a file of certificates (PEM) of
the authorities that a server's own must be signed by, in place of those that the system trusts.
"""

import logging
import os
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError

log = logging.getLogger(__name__)

PASSWORD_FILE, CA_CERTIFICATE = "NEO4J_PASSWORD_FILE", "NEO4J_CA_CERTIFICATE"
LARGEST_PASSWORD = 4096  # bytes


class BadPasswordFile(UserError):
    """The file that should hold a password cannot be read, or does not."""


class BadAuthority(UserError):
    """The file that should hold certificates of authorities does not."""


def password_of(environment: Mapping[str, str] = os.environ) -> str | None:
    """NEO4J_PASSWORD, else what the file NEO4J_PASSWORD_FILE holds, without the end of its line; None where neither is set.

    Raises `BadPasswordFile`; a file that others can read is warned of.
    """
    named = environment.get(PASSWORD_FILE)
    if environment.get("NEO4J_PASSWORD") is not None or not named:
        return environment.get("NEO4J_PASSWORD")
    path = Path(named).expanduser()
    try:
        with path.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(LARGEST_PASSWORD + 1)
        password = content.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise BadPasswordFile(f"{PASSWORD_FILE}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadPasswordFile(f"{PASSWORD_FILE}: {path} is no text: it must hold the password and nothing else") from None
    if not password or len(content) > LARGEST_PASSWORD or "\n" in password:
        raise BadPasswordFile(f"{PASSWORD_FILE}: {path} must hold the password, on one line, and nothing else")
    if stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("%s can be read by other users of this machine: chmod 600 %s", path, path)
    return password


def authorities(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file NEO4J_CA_CERTIFICATE, where set; raises `BadAuthority` unless it holds certificates."""
    named = environment.get(CA_CERTIFICATE)
    if not named:
        return None
    path = Path(named).expanduser()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # an SSLError is one
        why = error.strerror or "it is missing" if isinstance(error, FileNotFoundError) else "no certificate in PEM is in it"
        raise BadAuthority(f"{CA_CERTIFICATE}: {path} cannot be used ({why}): give the file of the authority's certificate") from None
    return path
