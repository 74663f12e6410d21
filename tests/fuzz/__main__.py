"""Runs damaged inputs and reports what went wrong.

    python -m tests.fuzz --count 3000 [--seed 0] [--target tar --target parquet] [--keep]

Every case is (seed, target, number): `--target tar --only 17` runs one again.
"""

import argparse
import collections
import sys

from tqdm import tqdm

from tests.fuzz import running, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="cases, spread over the targets; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--target", action="append", choices=sorted(targets.TARGETS), help="default: all")
    parser.add_argument("--only", type=int, help="number of one case of each target")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--messages", action="store_true", help="print every refusal")
    args = parser.parse_args()
    names = args.target or list(targets.TARGETS)
    cases = [(names[i % len(names)], i // len(names)) for i in range(args.count)]
    if args.only is not None:
        cases = [(name, args.only) for name in names]
    cases.sort(key=lambda case: names.index(case[0]))
    table = collections.defaultdict(collections.Counter)
    for outcome in tqdm(running.run(cases, args.seed, args.processes), total=len(cases), unit=" cases"):
        table[outcome.target][outcome.kind] += 1
        if outcome.is_fault or (args.messages and outcome.kind == "refused"):
            tqdm.write(f"{outcome.target} {outcome.number}: {outcome.kind}: {outcome.text}")
    kinds = ("read", "refused", "wrong", "traceback", "died", "hangs")
    print(f"{'seed ' + str(args.seed):28}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, counts in table.items():
        print(f"{name:28}" + "".join(f"{counts[kind]:10}" for kind in kinds))
    total = sum((counts for counts in table.values()), collections.Counter())
    print(f"{'all':28}" + "".join(f"{total[kind]:10}" for kind in kinds))
    sys.exit(any(total[kind] for kind in kinds[2:]))


if __name__ == "__main__":
    main()
