"""Tables of docs/benchmarks.md, made from work/results/*.jsonl and nothing else.

Text outside the markers `<!-- bench:NAME:begin -->` and `<!-- bench:NAME:end -->` is kept.
"""

import json
import os
import pathlib
import re
import statistics
import time

MIB = 1 << 20
REFERENCE = "vmtide"


def load(work, scenario):
    """Counted rows (round 1 and later) of a scenario, by (step, tool), tools in order of first sight."""
    path = work / "results" / f"{scenario}.jsonl"
    groups = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["round"] >= 1:
                groups.setdefault((row["step"], row["tool"]), []).append(row)
    return groups


def median(rows, key):
    """Median of a figure over the rounds, None where it was not measured."""
    values = [r[key] for r in rows if key in r]
    return statistics.median(values) if values else None


def spread(rows, key):
    """Smallest and largest value, to show how far the rounds lie apart."""
    values = [r[key] for r in rows]
    return f"{min(values):.1f}–{max(values):.1f}"


def table(head, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def of_step(groups, step):
    """(tool, rows) of one step, fastest first."""
    found = [(tool, rows) for (s, tool), rows in groups.items() if s == step]
    return sorted(found, key=lambda item: median(item[1], "wall_s"))


def with_list(groups):
    """The incremental of every tool: by the list of changes where it takes one, by reading the disk elsewhere."""
    listed = {tool for step, tool in groups if step == "incremental"}
    read = {("incremental", tool): rows for (step, tool), rows in groups.items() if step == "day2" and tool not in listed}
    return {**groups, **read}


def ratio(rows, base, key="wall_s"):
    """How many times as long as vmtide, where vmtide was measured."""
    return f"{median(rows, key) / base:.2f}×" if base else "–"


def timing_table(groups, step, data_bytes, bytes_key=None, bytes_title=None):
    """Wall, settled, rate, CPU, memory and, where a step makes any, bytes of every tool in one step."""
    found = of_step(groups, step)
    if not found:
        return "Not measured yet."
    base = next((median(rows, "wall_s") for tool, rows in found if tool == REFERENCE), None)
    out = []
    for _, rows in found:
        wall = median(rows, "wall_s")
        out.append([rows[0]["label"], rows[0]["setting"], len(rows), f"{wall:.1f}", spread(rows, "wall_s"), ratio(rows, base),
                    f"{median(rows, 'settled_s'):.1f}", f"{data_bytes / MIB / wall:.0f}", f"{median(rows, 'cpu_s'):.1f}",
                    f"{max(r['rss_bytes'] for r in rows) / MIB:.0f}"])
        if bytes_key:
            size = median(rows, bytes_key)
            out[-1].append("–" if size is None else f"{size / MIB:.0f}")
    head = ["tool", "setting", "runs", "wall s (median)", "min–max", "vs vmtide", "on disk after s", "MiB/s", "CPU s", "peak MiB"]
    return table([*head, bytes_title] if bytes_key else head, out)


def scale_table(groups):
    """The incremental on the small and on the large disk, and what the size costs."""
    tools = {tool for _, tool in groups}
    out = []
    for tool in sorted(tools):
        small, large = (groups.get((f"incremental {size} GiB", tool)) for size in (16, 1024))
        if not small or not large:
            continue
        walls = [median(rows, "wall_s") for rows in (small, large)]
        out.append([tool, len(large), *(f"{w:.2f}" for w in walls), f"{(walls[1] / walls[0] - 1) * 100:+.1f} %",
                    *(f"{max(r['rss_bytes'] for r in rows) / MIB:.0f}" for rows in (small, large)),
                    *(f"{median(rows, 'added_bytes') / MIB:.0f}" for rows in (small, large))])
    if not out:
        return "Not measured yet."
    return table(["tool", "runs", "16 GiB disk, s", "1 TiB disk, s", "difference", "peak MiB (16 GiB)", "peak MiB (1 TiB)",
                  "added MiB (16 GiB)", "added MiB (1 TiB)"], out)


def qemu_scale_table(groups):
    """The incremental by QEMU's bitmap on both disks: seconds, what the size costs, bytes read per byte dirty.

    Rounds differ in what they write, and are the same on both disks: so the difference is the median of each round's."""
    small, large = (groups.get((f"incremental {size} GiB", REFERENCE)) for size in (16, 1024))
    if not small or not large:
        return "Not measured yet."
    reference = {r["round"]: r["wall_s"] for r in small}
    out = []
    for name, size, rows in (("16 GiB", 16, small), ("1 TiB", 1024, large)):
        full = median(groups.get((f"full {size} GiB", REFERENCE), []), "wall_s")
        ratios = [r["wall_s"] / reference[r["round"]] for r in rows if r["round"] in reference]
        difference = f"{(statistics.median(ratios) - 1) * 100:+.1f} %" if ratios else "–"
        out.append([name, len(rows), f"{median(rows, 'wall_s'):.2f}", spread(rows, "wall_s"), difference, f"{median(rows, 'cpu_s'):.1f}",
                    f"{median(rows, 'dirty_bytes') / MIB:.0f}", f"{max(r['read_bytes'] / r['dirty_bytes'] for r in rows):.3f}",
                    f"{median(rows, 'added_bytes') / MIB:.0f}", f"{max(r['rss_bytes'] for r in rows) / MIB:.0f}",
                    "–" if full is None else f"{full:.2f}"])
    return table(["disk", "runs", "incremental, s (median)", "min–max", "difference (median of rounds)", "CPU s", "dirty MiB",
                  "bytes read / dirty (largest)", "added MiB", "peak MiB", "first full backup, s"], out)


def memory_table(*sets):
    """Largest peak of every tool and step over all rounds."""
    steps, peaks = [], {}
    for groups in sets:
        for (step, tool), rows in groups.items():
            if step not in steps:
                steps.append(step)
            peaks.setdefault(tool, {})[step] = max(r["rss_bytes"] for r in rows) / MIB
    rows = [[tool, *(f"{p[s]:.0f}" if s in p else "–" for s in steps)] for tool, p in peaks.items()]
    return table(["peak MiB", *steps], rows) if rows else "Not measured yet."


def machine(work, groups, note):
    """The machine, the day, the disk and the versions."""
    cpu = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    memory = int(re.search(r"MemTotal:\s*(\d+)", pathlib.Path("/proc/meminfo").read_text()).group(1)) / MIB
    disk = json.loads((work / "disk.json").read_text())
    times = [r["time"] for rows in groups.values() for r in rows]
    loads = [r["load_before"] for rows in groups.values() for r in rows]
    versions = {r["label"]: r["version"] for rows in groups.values() for r in rows}
    day = " to ".join(sorted({time.strftime("%Y-%m-%d", time.gmtime(t)) for t in times} or {"–"})[::1])
    lines = [
        f"- Measured: {day}. Machine: {os.cpu_count()} cores, {cpu.group(1) if cpu else 'unknown processor'}"
        f"{', SHA extensions' if 'sha_ni' in flags else ''}{', AVX-512' if 'avx512f' in flags else ''}, {memory:.0f} GiB memory, "
        f"Linux {os.uname().release.split('-')[0]}.",
        f"- Disk: {disk['virtual_bytes'] >> 30} GiB virtual, {disk['day1']['allocated_bytes'] / MIB:.0f} MiB of it data in "
        f"{disk['files']} files; SHA-256 `{disk['day1']['sha256'][:16]}…`. The next day's state differs in {disk['changed_bytes'] / MIB:.0f} MiB "
        f"({disk['changed_ranges']} ranges of 64 KiB blocks); SHA-256 `{disk['day2']['sha256'][:16]}…`.",
        f"- Load average before the commands: {min(loads, default=0):.1f} to {max(loads, default=0):.1f} (what a benchmark itself makes included).",
        "- Versions: " + "; ".join(f"{label}: {version}" for label, version in sorted(versions.items())) + ".",
    ]
    if note:
        lines.append(f"- {note}")
    return "\n".join(lines)


def commands(work):
    """The exact measured commands, with the repository and the disk by their short names."""
    import tools  # here, because tools is not needed by anybody who only reads a report

    rows = []
    disk, target = work / "live/disk.raw", work / "target"
    for cls in tools.ALL_TOOLS:
        tool = cls(work)
        given = []
        if not isinstance(tool, tools.Copier):
            given.append(tool.backup(disk, work / "changes.json" if tool.name == REFERENCE else None))
        given.append(tool.restore(target, disk)[0])
        if tool.verify():
            given.append(tool.verify())
        for command in given:
            text = " ".join(f"'{a}'" if " " in a and "$" in a else a for a in command)
            rows.append(text.replace(str(tool.repo), "REPO").replace(str(work), "bench/work").replace(str(tools.ROOT) + "/", ""))
    return "```\n" + "\n".join(rows) + "\n```"


def replace(text, name, body):
    """Put `body` between the markers of section `name`."""
    begin, end = f"<!-- bench:{name}:begin -->", f"<!-- bench:{name}:end -->"
    if begin not in text:
        raise SystemExit(f"docs/benchmarks.md lacks the marker {begin}")
    head, rest = text.split(begin, 1)
    return head + begin + "\n" + body + "\n" + end + rest.split(end, 1)[1]


def write(work, path, note):
    """Fill every section of docs/benchmarks.md."""
    main, scale, qemu = (load(work, scenario) for scenario in ("backup", "scale", "scale-qemu"))
    facts = json.loads((work / "disk.json").read_text())
    data, changed = facts["day1"]["allocated_bytes"], facts["changed_bytes"]
    sections = {
        "machine": machine(work, {**main, **scale, **qemu}, note),
        "full": timing_table(main, "full", data, "stored_bytes", "stored MiB"),
        "restore": timing_table(main, "restore", data, "target_bytes", "file MiB"),
        "verify": timing_table(main, "verify", data),
        "unchanged": timing_table(main, "unchanged", data, "added_bytes", "added MiB"),
        "day2": timing_table(main, "day2", data, "added_bytes", "added MiB"),
        "incremental": timing_table(with_list(main), "incremental", changed, "added_bytes", "added MiB"),
        "scale": scale_table(scale),
        "scale-qemu": qemu_scale_table(qemu),
        "memory": memory_table(main, scale),
        "commands": commands(work),
    }
    text = path.read_text()
    for name, body in sections.items():
        text = replace(text, name, body)
    path.write_text(text)
    print("\n\n".join(f"== {n} ==\n{b}" for n, b in sections.items() if n != "commands"))
