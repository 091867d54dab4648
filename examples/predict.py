"""Classify image files with a DVERGE service: python predict.py IMAGE...

DVERGE_URL is the address (http://localhost:3000), DVERGE_TOKEN the token. Needs only Python.
"""

import http.client
import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

ATTEMPTS = 5
URL = urlsplit(os.environ.get("DVERGE_URL", "http://localhost:3000"))
# The service finds the type of an image from its content.
HEADERS = {"Content-Type": "application/octet-stream"}
if token := os.environ.get("DVERGE_TOKEN"):
    HEADERS["Authorization"] = f"Bearer {token}"


def predict(connection: http.client.HTTPConnection, image: bytes) -> dict:
    """Return the prediction for one image file's bytes; waits while the service is full."""
    for attempt in range(1, ATTEMPTS + 1):
        connection.request("POST", f"{URL.path.rstrip('/')}/predict", image, HEADERS)
        response = connection.getresponse()
        body = response.read()
        if response.status == 200:
            return json.loads(body)["predictions"][0]
        if response.status != 503 or attempt == ATTEMPTS:
            break
        time.sleep(float(response.headers["Retry-After"] or 1))
    if response.headers.get_content_type() != "application/json":  # a proxy's own page
        raise ValueError(f"{response.status} {response.reason}")
    error = json.loads(body)["error"]
    raise ValueError(f"{error['code']}: {error['message']}")


def main(paths: list[str]) -> int:
    """Print one line for each image; return 1 if one was refused or had no answer."""
    secure = URL.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(URL.hostname, URL.port, timeout=60)  # kept open for all of them
    failed = False
    for path in paths:
        try:
            found = predict(connection, Path(path).read_bytes())
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
        except (OSError, http.client.HTTPException) as error:
            print(f"{path}: {error}", file=sys.stderr)
            connection.close()  # the next request opens it again
            failed = True
        else:
            notes = [f"{found['probability']:.3f}"] if "probability" in found else []
            notes += ["suspicious"] if found.get("suspicious") else []
            print("\t".join([path, found["label"], *notes]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
