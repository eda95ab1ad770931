"""What the owner of a bucket does with another program than vmtide: makes it, gives rights, and tries to remove what is locked.

botocore (in the environment of moto, which `scripts/test.sh` installs) speaks to the server, in a process of its own:

    bucket.py make NAME [--locked]     a bucket, with object lock
    bucket.py policy NAME FILE         the bucket's policy
    bucket.py remove NAME PREFIX       every version of every object under the prefix, with all rights and past governance;
                                       the last line is JSON: the keys that were refused and those that are gone
"""

import json
import os
import sys
from pathlib import Path

from .processes import TestFailure, run


class Owner:
    """The owner of a bucket. `environment` is what leads to the server, with the owner's keys."""

    def __init__(self, environment):
        self.environment = environment
        self.python = Path.home() / ".cache/vmtide-tests/moto/bin/python"
        if not self.python.is_file():
            raise TestFailure(f"missing: {self.python} (scripts/test.sh installs it)")

    def make(self, name, locked=False):
        self._run("make", name, *(["--locked"] if locked else []))

    def policy(self, name, file):
        self._run("policy", name, file)

    def remove(self, name, prefix):
        """Tries to remove everything; returns the keys refused and those gone."""
        told = json.loads(self._run("remove", name, prefix).splitlines()[-1])
        return told["refused"], told["gone"]

    def _run(self, *words):
        package = Path(__file__).resolve().parents[1]
        environment = self.environment | {"PYTHONDONTWRITEBYTECODE": "1"}
        return run([self.python, "-m", "lab.bucket", *words], cwd=package, env=environment).stdout


def _remove(s3, name, prefix):
    from botocore.exceptions import ClientError

    told = {"refused": [], "gone": []}
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=name, Prefix=prefix):
        for version in page.get("Versions", []):
            try:
                s3.delete_object(
                    Bucket=name, Key=version["Key"], VersionId=version["VersionId"], BypassGovernanceRetention=True
                )
                told["gone"].append(version["Key"])
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("AccessDenied", "InvalidRequest"):
                    raise
                told["refused"].append(version["Key"])
    print(json.dumps(told))


def main(words):
    import botocore.session

    s3 = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    match words:
        case ["make", name]:
            s3.create_bucket(Bucket=name)
        case ["make", name, "--locked"]:
            s3.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
        case ["policy", name, file]:
            s3.put_bucket_policy(Bucket=name, Policy=Path(file).read_text(encoding="ascii"))
        case ["remove", name, prefix]:
            _remove(s3, name, prefix)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
