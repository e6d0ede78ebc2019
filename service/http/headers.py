"""Headers of every answer, for browsers: nothing that the API sends is a page, may be guessed to be one, or be framed by one."""

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}
