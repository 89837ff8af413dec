"""Ray's own client of its Jobs API, with limits on time, and with errors that are one line."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from ray._common.utils import get_default_ray_temp_dir
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import find_bootstrap_address
from ray._raylet import AuthenticationTokenLoader
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from unimoe_ray.errors import UnimoeError, UsageError

CONNECT_S = 5.0
# Ray's dashboard itself waits up to 30 s for a job agent.
ANSWER_S = 60.0
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Unreachable(UnimoeError):
    """The cluster gave no answer. A later try may get one."""


class Refused(UnimoeError):
    """The cluster's answer is an error. status: of HTTP."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Client(JobSubmissionClient):
    """Raises Unreachable and Refused where Ray's client raises whatever its libraries do."""

    def __init__(self, url: str):
        self._url = url
        with _without_variables():  # Ray's client prefers them to what it is given.
            super().__init__(url)
        version = self._do_request("GET", "/api/version").json()
        self.ray_version, self.session = str(version["ray_version"]), str(version["session_name"])

    @property
    def is_here(self) -> bool:
        """Whether the cluster's head is on this machine: a loopback address may be a forwarded port."""
        return Path(get_default_ray_temp_dir(), self.session).is_dir()

    def job(self, given: str) -> JobDetails:
        """The submitted job of this id, or the only one whose id starts so. Raises UsageError."""
        known = {job.submission_id: job for job in self.list_jobs() if job.submission_id}
        if given in known:
            return known[given]
        found = [name for name in known if name.startswith(given)]
        if len(found) == 1:
            return known[found[0]]
        if found:
            raise UsageError(f"{given}: the start of several jobs of {self._url}: {', '.join(sorted(found))}")
        near = difflib.get_close_matches(given, known, n=1, cutoff=0)
        hint = f"did you mean {near[0]}?" if near else "it has none"
        raise UsageError(f"{given}: no such job of {self._url}; {hint}")

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)
        except AuthenticationError as error:
            raise _token_error(self._url, missing="required" in str(error).partition("\n")[0]) from None
        except requests.Timeout:
            raise Unreachable(f"{self._url}: no answer in time") from None
        except requests.exceptions.SSLError as error:
            raise UnimoeError(f"{self._url}: {error}") from None
        except requests.ConnectionError:
            raise Unreachable(f"{self._url}: no Ray cluster answers there (is its dashboard running?)") from None
        except requests.RequestException as error:
            raise UsageError(f"{self._url}: {error}") from None

    def _raise_error(self, r: requests.Response) -> None:
        text = r.text.strip()
        if "No available agent" in text or "Failed to get head node agent" in text:
            raise Refused(
                f"{self._url}: the cluster has no job agent: another Ray cluster on its machine probably has the "
                "agent's port, 52365; start one of them with ray start --head --dashboard-agent-listen-port=PORT",
                r.status_code,
            )
        # The server answers with a traceback, whose last line is the reason.
        reason = text.splitlines()[-1].strip() if text else r.reason
        raise Refused(f"{self._url}: {reason} ({r.status_code})", r.status_code)


def connect(given: str | None, configured: str | None = None) -> Client:
    """The cluster of ``--address``, the environment or the configuration, else the one of ``ray start`` here.

    Raises UsageError for an address that names none, Unreachable, and UnimoeError for what is not accepted.
    """
    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if _has_token():
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # As ray.init does to join a cluster.
    api, ray_address = (os.environ.get(name) for name in VARIABLES)
    address = given or api or configured or ray_address or "auto"
    url = address if address.startswith(("http://", "https://")) else _dashboard(address)
    try:
        return Client(url.rstrip("/"))
    except AuthenticationError:
        raise _token_error(url, missing=True) from None
    except (RuntimeError, ValueError, KeyError):
        raise UnimoeError(f"{url}: this is no Ray dashboard (or one before Ray 2.0)") from None


def _dashboard(address: str) -> str:
    """URL of the dashboard of a cluster that is named as for ``ray.init``: ``auto``, ``HOST:6379``, ``ray://...``."""
    if address in ("auto", "local"):
        found = find_bootstrap_address(None)
        if found is None:
            raise UnimoeError(
                "no Ray cluster was started on this machine: start one with ray start --head, name another with "
                "--address http://HOST:8265, or run the job without one: python -m jobs.tune"
            )
        address = found
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{address!r} is no address of a cluster; write http://HOST:8265, HOST:6379 or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise Unreachable(f"{address}: no Ray cluster answers there ({error.strerror or error})") from None
    if "://" not in address and _speaks_http(address):
        return f"http://{address}"
    try:
        with _without_variables():
            return get_address_for_submission_client(address)
    except (RayError, RuntimeError, ValueError, OSError) as error:
        if "InvalidAuthToken" in str(error) or isinstance(error, AuthenticationError):
            raise _token_error(address, missing=not _has_token()) from None
        raise UnimoeError(f"{address}: {' '.join(str(error).split())[:300]}") from None


def _speaks_http(address: str) -> bool:
    """A dashboard's port does; that of ``ray start --head``, 6379, does not."""
    try:
        requests.get(f"http://{address}/api/version", timeout=CONNECT_S)
    except requests.RequestException:
        return False
    return True


def _has_token() -> bool:
    try:
        return AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH names no file, or RAY_AUTH_MODE=token and there is none.
        return False


def _token_error(url: str, missing: bool) -> UnimoeError:
    """Names where the token comes from, never the token."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not missing:
        origin = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else path or "~/.ray/auth_token"
        return UnimoeError(f"{url}: the token of {origin} is not the one of this cluster")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        why = f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} sends none: set RAY_AUTH_MODE=token"
    elif path and not Path(path).is_file():
        why = f"RAY_AUTH_TOKEN_PATH={path}: no such file"
    else:
        why = "set RAY_AUTH_TOKEN_PATH to a file that holds it (or RAY_AUTH_TOKEN)"
    return UnimoeError(f"{url}: the cluster wants its token; {why}")


@contextlib.contextmanager
def _without_variables() -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)
