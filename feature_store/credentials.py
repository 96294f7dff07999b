"""Credentials in addresses: a signature in the query, or a user and a password. They are shown nowhere.

Errors, printed commands and representations leave them out, so that they reach no terminal, log, notebook or tracking
server. `source.json` of a data set keeps the query of an address, since later stages read the data with it.
"""

import re

# careful: a path of pathlib has one slash of the two
_USER = re.compile(r"(://|\bhttps?:/)[^/@\s?'\"`]+@")
_QUERY = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]+)(://?[^\s?'\"`<>]+)\?[^\s'\"`<>]*[^\s'\"`<>.,;:)\]}]")
_SIGNED = re.compile(
    r"[?&](?:[\w-]*signature|sig|[\w-]*token|[\w-]*credential|[\w-]*key|[\w-]*keyid|[\w-]*password)=", re.IGNORECASE
)
"""Parameters that sign an address: of S3, of Google, of CloudFront, of Azure (SAS), and tokens and passwords of
others."""
_WEB = ("http", "https")
"""Protocols whose queries are never shown. Names of objects may hold a question mark, and the query of a database
(`sqlite:///FILE?mode=ro`) says how it was opened."""


def without_credentials(text: str) -> str:
    """The text with `...` in the place of the query, user and password of each address in it.

    Of an address that is not of the web, a query is left out only where a parameter of it lets its holder in.
    """
    return _QUERY.sub(_without_query, _USER.sub(r"\1...@", text)) if ":/" in text else text


class WithoutCredentials(Exception):
    """The base of errors whose message holds no credentials of an address, whatever it was made of."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(without_credentials(part) if isinstance(part, str) else part for part in parts))


def is_signed(address: str) -> bool:
    """Whether the query of an address has a parameter that lets its holder read the object."""
    return _SIGNED.search(address) is not None


def _without_query(found: re.Match[str]) -> str:
    is_harmless = found[1].lower() not in _WEB and not is_signed(found[0])
    return found[0] if is_harmless else f"{found[1]}{found[2]}?..."
