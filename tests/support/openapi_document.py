"""The OpenAPI document of an application that nothing was started for. As a program: prints it, for docs/openapi.json."""

import json
from typing import Any

from service.app import create_app
from service.settings import ApiSettings

SECRET = "integration-tests-only-0123456789abcdef"


def document() -> dict[str, Any]:
    nowhere = "/nowhere"
    app = create_app(
        ApiSettings(
            database={"url": "postgresql://localhost:1/none"},
            broker={"url": "redis://localhost:1"},
            artifacts={"url": nowhere},
            models={"folder": nowhere},
            secret_key=SECRET,
        )
    )
    return app.openapi()


if __name__ == "__main__":
    print(json.dumps(document(), indent=1, ensure_ascii=False))
