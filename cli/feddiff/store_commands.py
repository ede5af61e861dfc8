"""The command about stores: `feddiff store check`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feddiff_protocol.errors import UsageInvalid

from .answers import AsJson, print_json

if TYPE_CHECKING:
    from feddiff_protocol.access import Role

    from .store_checks import StoreToCheck


class RoleName(StrEnum):
    """feddiff_protocol.access.Role, which --help need not load."""

    OWNER = "owner"
    FEDERATION = "federation"
    TRAINER = "trainer"


def store_check(
    uri: Annotated[
        str | None, typer.Argument(metavar="STORE", help="s3://bucket/prefix or file:///folder; else --file.")
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="YAML with a job, datasets; may be repeated."),
    ] = None,
    role: Annotated[
        RoleName | None, typer.Option(metavar="ROLE", help="Whose keys: owner, federation (an owner's there), trainer.")
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The client whose keys are used; may be repeated.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="The server, unless AWS_… say which.")] = None,
    print_policy: Annotated[
        bool, typer.Option("--print-policy", help="Print the least policies instead; asks no store.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Can a store carry releases, and who gets in?

    Tries what stages do, with the keys in the environment, and asks how the bucket is set. What it writes it deletes.
    Ends with 77 for a store in which a release could happen twice, or that is open to others.
    """
    if (uri is None) == (not files):
        raise UsageInvalid("expected either STORE or --file, found both or none; name one")
    from . import store_checks

    whose, clients = _role(role), client or []
    named = store_checks.named_stores(files) if files else None
    if print_policy:
        at = store_checks.parties_at
        parties = at(uri or "", whose, clients) if named is None else store_checks.parties_of(named, whose, clients)
        _print_policies(store_checks.policies_of(parties), as_json)
        return
    if named is None:
        stores = [store_checks.store_at(uri or "", whose, clients)]
    else:
        stores = store_checks.stores_to_check(named, whose, clients)
    _print_checks(stores, endpoint, as_json)


def _role(name: RoleName | None) -> "Role | None":
    from feddiff_protocol.access import Role

    return None if name is None else Role(name.value)


def _print_policies(policies: list[dict[str, Any]], as_json: bool) -> None:
    from .store_checks import policy_lines

    if as_json:
        print_json({"policies": policies})
    else:
        print("\n".join(line for policy in policies for line in policy_lines(policy)))


def _print_checks(stores: "list[StoreToCheck]", endpoint: str | None, as_json: bool) -> None:
    from .store_checks import exit_code_of, finding_line, findings_of

    findings = {each: findings_of(each, endpoint) for each in stores}
    documents = [
        {"store": each.uri, "role": each.role, "client": each.client, "findings": found}
        for each, found in findings.items()
    ]
    if as_json:
        print_json({"stores": documents})
    else:
        for each, found in findings.items():
            print("\n".join([each.title, *(f"  {finding_line(finding)}" for finding in found), ""]))
    for each, found in findings.items():
        if failed := [finding["check"] for finding in found if finding["exitCode"]]:
            print(f"feddiff: {each.title}: {len(failed)} of {len(found)} failed: {', '.join(failed)}", file=sys.stderr)
    if code := exit_code_of([finding for found in findings.values() for finding in found]):
        raise typer.Exit(code)
