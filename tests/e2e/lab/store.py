"""An S3 server as a place for repositories: the tests of the store on it, and the program from init to prune."""

import os

from .processes import REPO_ROOT, TestFailure, run
from .repository import Job, live

SUITE_LIMIT_S = 1800


def suite(environment, url, locked=None):
    """The tests of the store, with the place `url` on this server as one more, and `locked`, in a bucket with object lock."""
    environment = environment | {"VMTIDE_TEST_S3": url}
    if locked is not None:
        environment["VMTIDE_TEST_S3_LOCKED"] = locked
    for name in ("VMTIDE_S3S_FS", "VMTIDE_MOTO_SERVER"):
        if name in os.environ:
            environment[name] = os.environ[name]
    command = ["cargo", "test", "--quiet", "--locked", "-p", "vmtide-s3", "--test", "real_servers"]
    run(command, timeout_s=SUITE_LIMIT_S, cwd=REPO_ROOT, env=environment)


def program(environment, wrong, url, path, tally, **differs):
    """From init to prune, then with the keys of `wrong`. The server must give every guarantee, but for those that differ."""
    job = Job(url, environment, path)
    found = job.run("init", job.repository)["guarantees"]
    expected = {"conditional_write": "yes", "list_after_write": "yes", "list_after_delete": "yes", "read_after_write": "yes"}
    for name, value in (expected | differs).items():
        if found[name] != value:
            raise TestFailure(f"{name} is {found[name]!r}, not {value!r}: {found}")
    tally.passed += 1
    job.run("init", job.repository, code=1)
    live(job, tally)
    job.run("points", code=4, environment=wrong)
    tally.passed += 1
