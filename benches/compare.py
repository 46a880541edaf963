"""What got slower: `python -m benches.compare NEW.json [OLD.json]`; OLD is the committed file of the same device kind.

Compared are the ratios to the peers, as a peer beside it in the same run sees the same machine. Slower is a case whose
ratios have fallen by more than the spread, that is, to quartiles below the old quartiles, against every peer that both
runs have. Exit code 1 then, 2 where nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benches import run
from benches.table import factor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.compare", description=__doc__)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?")
    args = parser.parse_args(argv)
    new = json.loads(args.new.read_text())
    path = args.old or run.FOLDER / "results" / args.new.name
    if not path.exists():
        print(f"{path} is not there: no results of this kind of device are committed, nothing to compare")
        sys.exit(2)
    old = json.loads(path.read_text())
    for name in new["versions"]:
        if new["versions"][name] != old["versions"].get(name):
            print(f"note: {name} {old['versions'].get(name)} then, {new['versions'][name]} now")
    slower, compared = slower_cases(new, old)
    for line in slower:
        print(line)
    print(f"{len(slower)} of {compared} cases that both runs have are slower by more than the spread")
    sys.exit(1 if slower else 0 if compared else 2)


def slower_cases(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], int]:
    """A line for each case that got slower, and how many cases were compared."""
    lines, compared = [], 0
    for key, case in new["cases"].items():
        before = old["cases"].get(key)
        if before is None:
            continue
        broken = before["contenders"][before["ours"]]["status"] == "timed"
        ours = case["contenders"].get(case["ours"], {})
        if broken and ours.get("status") != "timed":
            compared += 1
            lines.append(f"{key}: {ours.get('status')} now, {ours.get('why')}")
            continue
        pairs = {
            name: (before["ratios"][name], ratio)
            for name, ratio in case["ratios"].items()
            if name in before["ratios"] and before["ratios"][name]["clock"] == ratio["clock"]
        }
        if not pairs:
            continue
        compared += 1
        if all(now["q3"] < then["q1"] for then, now in pairs.values()):
            told = [
                f"{factor(now['time'])} ({factor(now['q1'])} to {factor(now['q3'])}) of {name}'s speed, "
                f"was {factor(then['time'])} ({factor(then['q1'])} to {factor(then['q3'])})"
                for name, (then, now) in pairs.items()
            ]
            lines.append(f"{key}: {'; '.join(told)}")
    return lines, compared


if __name__ == "__main__":
    main()
