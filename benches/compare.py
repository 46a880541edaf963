"""What got slower: `python -m benches.compare` measures anew and looks at the committed results of this kind of device.

Compared are the ratios to the peers, as a peer beside it in the same run sees the same machine. Slower is a case whose
ratios have fallen by more than the spread, that is, to quartiles below the old quartiles, against every peer that both
runs have. Exit code 1 then, 2 where nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benches import run
from benches.table import factor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.compare", description=__doc__)
    parser.add_argument("new", type=Path, nargs="?", help="results to judge, instead of measuring")
    parser.add_argument("old", type=Path, nargs="?", help="results to compare with, instead of the committed ones")
    args = parser.parse_args(argv)
    committed = run.committed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = args.old or (run.FOLDER / "results" / args.new.name if args.new else committed)
    if not path.exists():
        print(f"{path} is not there: no results of this kind of device are committed, nothing to compare")
        sys.exit(2)
    if args.new is None:
        args.new = Path("runs") / "bench" / path.name
        subprocess.run([sys.executable, "-m", "benches.run", "--out", str(args.new)], check=True)
    new, old = json.loads(args.new.read_text()), json.loads(path.read_text())
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
