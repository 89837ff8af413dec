"""What an API server's refusal means, in words: its messages are the same in errors, events and conditions."""

from __future__ import annotations

import re


def in_words(message: str) -> str | None:
    """A known refusal (quota, limits, pod security, webhooks, ...) with what to do about it; None for any other."""
    for pattern, words in _KNOWN:
        if match := pattern.search(message):
            return words(match)
    return None


def _quota(match: re.Match[str]) -> str:
    asked, used, limited = (_amounts(match[part]) for part in ("requested", "used", "limited"))
    parts = [
        f"{resource} {amount} asked, {used.get(resource, '?')} of {limited.get(resource, '?')} used"
        for resource, amount in asked.items()
    ]
    return f"the quota {match['quota']!r} is exceeded: {'; '.join(parts)}; free some, ask for less, or raise the quota"


def _amounts(text: str) -> dict[str, str]:
    return dict(item.strip().split("=", 1) for item in text.split(",") if "=" in item)


def _webhook_down(match: re.Match[str]) -> str:
    return (
        f"the admission webhook {match['name']!r} did not answer ({match['why'].strip().rstrip('.')}): "
        "the service behind it must run; the document itself was not judged"
    )


_KNOWN = (
    (
        re.compile(
            r"exceeded quota: (?P<quota>[^,\s]+), requested: (?P<requested>[^:]+), used: (?P<used>[^:]+), "
            r"limited: (?P<limited>[^:]*\S)"
        ),
        _quota,
    ),
    (
        re.compile(r"failed quota: (?P<quota>[^:\s]+): must specify (?P<what>[^;]*?)(?: for: (?P<where>\S+))?$"),
        lambda m: (
            f"the quota {m['quota']!r} of the namespace wants {m['what']} stated"
            + (f" for container {m['where']}" if m["where"] else "")
        ),
    ),
    (
        re.compile(r"(?P<bound>maximum|minimum) (?P<what>[\w./-]+) usage per (?P<per>\w+) is (?P<is>[^,\s]+)"),
        lambda m: (
            f"a LimitRange of the namespace allows at {_most(m['bound'])} {m['is']} of {m['what']} per {m['per']}"
        ),
    ),
    (
        re.compile(r'violates PodSecurity "(?P<level>[^"]+)": (?P<why>.+)', re.DOTALL),
        lambda m: f"the namespace enforces pod security {m['level']!r}: {m['why'].strip()}",
    ),
    (re.compile(r'failed calling webhook "(?P<name>[^"]+)": (?:failed to call webhook: )?(?P<why>.+)'), _webhook_down),
    (
        re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request: (?P<why>.+)', re.DOTALL),
        lambda m: f"the admission webhook {m['name']!r} denied it: {m['why'].strip()}",
    ),
    (
        re.compile(r"ValidatingAdmissionPolicy '(?P<name>[^']+)'.* denied request: (?P<why>.+)", re.DOTALL),
        lambda m: f"the admission policy {m['name']!r} denied it: {m['why'].strip()}",
    ),
    (
        re.compile(r"in namespace (?P<name>\S+) because it is being terminated"),
        lambda m: f"the namespace {m['name']!r} is being deleted: wait until it is gone, or use another",
    ),
    (
        re.compile(r'(?:serviceaccount|service account) "?(?P<name>[\w./-]+)"? (?:was )?not found'),
        lambda m: f"the service account {m['name']!r} does not exist in the namespace",
    ),
)


def _most(bound: str) -> str:
    return "most" if bound == "maximum" else "least"
