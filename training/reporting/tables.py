"""What both report.html and report.md say in words and tables, as plain text: escaping is for those who show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from training.config import RunConfig, to_plain
from training.record.reader import finite, flat, mapping
from training.record.spike_score import WINDOW
from training.reporting.analysis import (
    LOSS_STEPS,
    PARTS,
    RECENT_STEPS,
    SPIKE_SIGMA,
    Launch,
    Spikes,
    Story,
    as_json,
    gpus,
    recent,
)
from training.reporting.format import NOTHING, brief, compact, count, duration, moment, number, percent, sentence, size


@dataclass(frozen=True)
class Table:
    """numeric: indices of the columns that hold numbers. Every row has a cell for each column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """One of the numbers at the top. beside: what puts it into proportion."""

    name: str
    value: str
    beside: str = ""


# -- the head -----------------------------------------------------------------------------------------


def figures(story: Story) -> list[Figure]:
    steps, done = story.record.steps, None
    if story.step is not None and story.max_steps:
        done = story.step / story.max_steps
    of = f"of {count(story.max_steps)}, {percent(done)}" if done is not None else ""
    tokens, epoch = steps.last("tokens"), steps.last("epoch")
    found = [
        Figure("step", count(story.step), of),
        Figure("tokens", compact(tokens), "" if epoch is None else f"epoch {number(epoch, 3)}"),
        Figure("loss", number(story.loss), f"nats/token, last {min(LOSS_STEPS, len(steps))} steps"),
        Figure(
            "held-out",
            number(story.bpb),
            "bits/byte" if story.unigram_bpb is None else f"bits/byte, unigram {number(story.unigram_bpb, 3)}",
        ),
        Figure("tokens/s", compact(story.tokens_per_s), "" if story.mfu is None else f"MFU {percent(story.mfu)}"),
        Figure("time spent", duration(story.elapsed_s)),
    ]
    if story.state == "finished":
        return found
    left = duration(story.left_s)
    end = moment(story.record.read_at + story.left_s) if story.left_s is not None and story.state == "running" else ""
    return [*found, Figure("time left", left, f"until {end}" if end else "once it goes on")]


def facts(story: Story) -> list[tuple[str, str]]:
    """What, on what, where: (name, text)."""
    record = story.record
    env, launches = record.env, story.launches
    told = [
        ("Model", _model(story)),
        ("Data", _data(story)),
        ("Batch", _batch(story)),
        ("Devices", _devices(story)),
        (
            "Versions",
            ", ".join(
                f"{name} {env[name]}" for name in ("torch", "deepspeed", "cuda", "python", "project") if env.get(name)
            )
            or NOTHING,
        ),
        ("Began", moment(launches[0].began) if launches else NOTHING),
        ("Last line", moment(launches[-1].ended) if launches else NOTHING),
    ]
    if parent := record.run.get("parent"):
        told.append(("Forked from", brief(as_json(parent))))
    if record.run.get("tracking_id"):
        told.append(("Tracking id", brief(record.run["tracking_id"])))
    return told


def _model(story: Story) -> str:
    m, parameters = mapping(story.record.config.get("model")), story.parameters
    if not m:
        return "unknown: config.yaml does not say"
    said = [f"{compact(parameters['total'], 4)} parameters"] if parameters else []
    said.append(f"{m.get('n_layers')} layers of {m.get('d_model')}, {m.get('n_heads')} heads on {m.get('n_kv_heads')}")
    if m.get("sparse"):
        said.append(f"{m.get('k_min')} to {m.get('k_max')} keys per query, {m.get('k_base')} before adaptation")
    else:
        said.append("dense attention")
    gates = [name for name, key in (("value", "value_gate"), ("output", "output_gate")) if m.get(key)]
    return "; ".join([*said, f"gates: {', '.join(gates) or 'none'}"])


def _data(story: Story) -> str:
    data = mapping(story.record.config.get("data"))
    mixture = mapping(data.get("mixture"))
    if mixture:
        return ", ".join(f"{folder} ({brief(weight)})" for folder, weight in mixture.items())
    return brief(data.get("data_dir"))


def _batch(story: Story) -> str:
    record, training = story.record, mapping(story.record.config.get("training"))
    ranks = finite(record.run, "world_size")
    micro = finite(record.ds_config, "train_micro_batch_size_per_gpu") or finite(training, "micro_batch_size")
    accumulated = finite(record.ds_config, "gradient_accumulation_steps")
    length = finite(training, "max_seq_len")
    if None in (ranks, micro, accumulated, length):
        return NOTHING
    windows = ranks * micro * accumulated
    return (
        f"{count(windows * length)} tokens: {count(windows)} windows of {count(length)} = "
        f"{count(ranks)} {'rank' if ranks == 1 else 'ranks'} × "
        f"{count(micro)} × {count(accumulated)} accumulated"
    )


def _devices(story: Story) -> str:
    record = story.record
    device = (record.told("device") or [{}])[-1]
    env_devices = record.env.get("devices")
    listed = env_devices if isinstance(env_devices, list) and env_devices else []
    name = device.get("name") or (listed[0] if listed else None)
    ranks = record.run.get("world_size") or device.get("world_size")
    said = [f"{brief(ranks)} × {name}" if name and ranks else brief(name)]
    if (memory := finite(device, "memory_gib")) is not None:
        said.append(f"{number(memory, 3)} GiB")
    if (peak := finite(device, "peak_tflops")) is not None:
        said.append(f"{number(peak, 3)} TFLOP/s ({brief(device.get('peak_source'))})")
    if (stage := record.run.get("zero_stage")) is not None:
        said.append(f"ZeRO {brief(stage)}")
    if backend := record.run.get("backend"):
        said.append(f"{brief(backend)} kernels")
    return ", ".join(said)


def predictions(story: Story) -> str:
    """What the count before the run said, beside what was measured; "" when it said nothing."""
    told = story.record.told("predicted")
    if not told:
        return ""
    row, said = told[-1], []
    if finite(row, "memory_gib") is not None and finite(row, "measured_gib") is not None:
        said.append(f"memory {number(row['memory_gib'], 3)} GiB by count, {number(row['measured_gib'], 3)} measured")
    if finite(row, "seconds") is not None and finite(row, "measured_seconds") is not None:
        said.append(f"{duration(row['seconds'])} a step by count, {duration(row['measured_seconds'])} measured")
    return "; ".join(said)


# -- sections -----------------------------------------------------------------------------------------


def spike_line(story: Story) -> str:
    spikes = story.spikes
    if not len(story.record.steps):
        return ""
    source = "counted here from the loss" if spikes.counted_here else "as the trainer scored them"
    return (
        f"Spike score {percent(spikes.share)}: the loss of {count(len(spikes.at))} of {count(len(spikes.score))} steps "
        f"lies more than {number(SPIKE_SIGMA)} standard deviations above the mean of the {count(WINDOW)} before, "
        f"{source}." + (f" With them count {count(spikes.undone)} that a rollback took back." if spikes.undone else "")
    )


def _spikes_in_words(spikes: Spikes) -> str:
    found = len(spikes.at) + spikes.undone
    return f"{percent(spikes.share)} ({count(found)})" if len(spikes.score) else "-"


def spike_table(story: Story) -> Table:
    """What was done about spikes, newest first."""
    rows = [
        (
            count(row["step"]),
            number(finite(row, "spike_loss")),
            number(finite(row, "score"), 3),
            brief(row.get("action")),
            _span(row.get("samples")),
        )
        for row in reversed(story.record.told("spike"))
    ]
    return Table(("Step", "Loss", "Score", "Action", "Samples"), tuple(rows), frozenset({0, 1, 2}))


def _span(pair: object) -> str:
    if isinstance(pair, list) and len(pair) == 2 and all(type(v) is int for v in pair):
        return f"{count(pair[0])} to {count(pair[1])}"
    return brief(pair)


def budget_table(story: Story) -> Table:
    budget = story.budget
    rows = [
        (
            name,
            duration(budget.seconds[part]),
            percent(budget.seconds[part] / budget.total if budget.total else None),
            meaning,
        )
        for part, (name, meaning) in PARTS.items()
    ]
    return Table(("Part", "Time", "Share", "What it is"), tuple(rows), frozenset({1, 2}))


def share_table(stories: Sequence[Story]) -> Table:
    """Where the time went, a column for each run."""
    rows = [
        (
            name,
            *(
                percent(s.budget.seconds[part] / s.budget.total) if s.budget and s.budget.total else NOTHING
                for s in stories
            ),
        )
        for part, (name, _) in PARTS.items()
    ]
    return Table(("Part", *(s.label for s in stories)), tuple(rows), frozenset(range(1, len(stories) + 1)))


def budget_line(story: Story) -> str:
    budget = story.budget
    said = f"{duration(budget.total)} on rank 0's clock."
    if len(story.launches) > 1:
        said += f" Besides, {duration(budget.between)} between launches, in which no step could be taken."
    return said


def gpu_table(story: Story) -> Table:
    """Medians over the last steps, GPU by GPU of rank 0's node; no row without GPUs."""
    steps, rows = story.record.steps, []
    for i in gpus(steps):
        get = {
            name: recent(steps, f"gpu/{i}/{name}")
            for name in (
                "utilisation",
                "clock_mhz",
                "max_clock_mhz",
                "power_w",
                "power_limit_w",
                "memory_gib",
                "temperature_c",
            )
        }
        throttled = steps.of(f"gpu/{i}/throttled")[-RECENT_STEPS:]
        held = float(np.nanmean(throttled)) if np.isfinite(throttled).any() else None
        rows.append(
            (
                str(i),
                percent(get["utilisation"]),
                f"{count(get['clock_mhz'])} of {count(get['max_clock_mhz'])} MHz",
                f"{count(get['power_w'])} of {count(get['power_limit_w'])} W",
                f"{number(get['memory_gib'], 3)} GiB",
                f"{count(get['temperature_c'])} °C",
                percent(held),
            )
        )
    columns = ("GPU", "Busy", "Clock", "Power", "Memory", "Temperature", "Held down")
    return Table(columns, tuple(rows), frozenset(range(1, 7)))


def launch_table(story: Story) -> Table:
    rows = []
    for i, launch in enumerate(story.launches):
        steps = NOTHING if launch.first is None else f"{count(launch.first)} to {count(launch.last)}"
        rows.append(
            (
                str(i),
                "nothing" if launch.kind == "start" else brief(launch.checkpoint),
                moment(launch.began),
                f"{count(launch.world_size)} × ZeRO {count(launch.zero_stage)}",
                steps,
                duration(launch.seconds),
                launch.ending,
                _replay(launch),
            )
        )
    columns = ("Launch", "From", "Began", "Ranks", "Steps", "Time", "Ended", "Replay")
    return Table(columns, tuple(rows), frozenset({5}))


def _replay(launch: Launch) -> str:
    said = [f"{count(launch.lost)} lost"] if launch.lost else []
    if launch.replayed:
        said.append(f"{count(launch.replayed)} replayed")
    if launch.receipt is not None:
        said.append(receipt_words(launch.receipt))
    return "; ".join(said) or NOTHING


def receipt_words(receipt: dict) -> str:
    """What the comparison of replayed steps with the lost ones found."""
    compared = count(finite(receipt, "compared"))
    if receipt.get("identical") is True:
        return f"receipt: identical in {compared} steps"
    d = mapping(receipt.get("first_difference"))
    if not d:
        return f"receipt: {compared} steps compared, not identical"
    return (
        f"receipt: {compared} steps compared, {brief(d.get('field'))} differs first, at step {brief(d.get('step'))}: "
        f"{brief(d.get('before'))} → {brief(d.get('now'))}"
    )


def config_changes(launch: Launch) -> list[tuple[str, str, str]]:
    """(key, before, now) of what the launch changed."""
    pairs = (launch.config_diff or {}).items()
    return [(str(k), brief(v[0]), brief(v[1])) for k, v in pairs if isinstance(v, list) and len(v) == 2]


def change_table(story: Story) -> Table:
    """All changes of the configuration between launches, newest first."""
    launches = reversed(list(enumerate(story.launches)))
    rows = [(str(i), *change) for i, launch in launches for change in config_changes(launch)]
    return Table(("Launch", "Key", "Before", "Now"), tuple(rows))


def checkpoint_table(story: Story) -> Table:
    steps = story.record.steps
    at = {int(step): i for i, step in enumerate(steps.of("step"))}
    rows = []
    for c in reversed(story.checkpoints):
        i = at.get(c.step)
        tokens, loss = (None, None) if i is None else (float(steps.of("tokens")[i]), float(steps.of("loss")[i]))
        rows.append(
            (
                c.tag,
                compact(tokens),
                number(loss),
                size(c.bytes),
                _created(c.created),
                c.verdict,
                ", ".join(c.marks) or NOTHING,
            )
        )
    columns = ("Tag", "Tokens", "Loss", "Size", "Made", "Verdict", "Marks")
    return Table(columns, tuple(rows), frozenset({1, 2, 3}))


def _created(iso: str | None) -> str:
    try:
        return moment(datetime.fromisoformat(iso).timestamp()) if iso else NOTHING
    except ValueError:  # sealed by another version
        return brief(iso)


def unsaved_line(story: Story) -> str:
    """What a crash now would cost."""
    if not story.unsaved or story.state in ("finished", "stopped"):
        return ""
    spent = recent(story.record.steps, "seconds")
    cost = "" if spent is None else f", {duration(spent * story.unsaved)} of work"
    verb = "would cost" if story.state == "running" else "costs"
    return f"{count(story.unsaved)} steps are in no checkpoint: a crash {verb} them{cost}."


# -- configuration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """default: None where this version has no such key. changed: the value is not the default."""

    name: str
    value: str
    default: str | None
    changed: bool


def settings(story: Story) -> dict[str, list[Setting]]:
    """config.yaml by section, beside the defaults."""
    defaults, found = flat(to_plain(RunConfig())), {}
    for key, value in flat(story.record.config).items():
        section, _, name = key.rpartition(".") if key.count(".") < 2 else key.partition(".")
        default = brief(defaults[key]) if key in defaults else None
        changed = key not in defaults or value != defaults[key]
        found.setdefault(section, []).append(Setting(name, brief(value), default, changed))
    return found


def setting_table(story: Story) -> Table:
    """What is set to something else than the default."""
    rows = [
        (f"{section}.{one.name}", one.value, one.default or "no such key in this version")
        for section, told in settings(story).items()
        for one in told
        if one.changed
    ]
    return Table(("Key", "Value", "Default"), tuple(rows))


def number_table(stories: Sequence[Story]) -> Table:
    """Final numbers, a column for each run."""
    rows: list[tuple[str, ...]] = []
    for name, tell in (
        ("state", lambda s: s.state),
        ("steps", lambda s: count(s.step)),
        ("of", lambda s: count(s.max_steps)),
        ("tokens", lambda s: compact(s.record.steps.last("tokens"), 4)),
        ("parameters", lambda s: compact(s.parameters.get("total"), 4)),
        (f"loss, last {LOSS_STEPS} steps (nats/token)", lambda s: number(s.loss)),
        ("held-out, last (bits/byte)", lambda s: number(s.bpb)),
        ("held-out, best (bits/byte)", lambda s: number(s.best_bpb)),
        ("unigram (bits/byte)", lambda s: number(s.unigram_bpb)),
        ("indexer loss (nats/row)", lambda s: number(recent(s.record.steps, "indexer_loss"))),
        ("indexer coverage", lambda s: percent(recent(s.record.steps, "indexer/coverage"))),
        ("spikes", lambda s: _spikes_in_words(s.spikes)),
        ("tokens/s", lambda s: count(s.tokens_per_s)),
        ("MFU", lambda s: percent(s.mfu)),
        ("peak memory (GiB)", lambda s: number(s.memory_gib)),
        ("time spent", lambda s: duration(s.elapsed_s)),
        (
            "productive",
            lambda s: (
                percent(s.budget.seconds["productive"] / s.budget.total) if s.budget and s.budget.total else NOTHING
            ),
        ),
    ):
        cells = [tell(story) for story in stories]
        if set(cells) != {NOTHING}:
            rows.append((name, *cells))
    return Table(("", *(s.label for s in stories)), tuple(rows), frozenset(range(1, len(stories) + 1)))


def difference_table(stories: Sequence[Story]) -> Table:
    """Settings in which the runs differ, a column for each run."""
    told = [_told(story) for story in stories]
    keys = list(dict.fromkeys(key for settings in told for key in settings))
    rows = [
        (key, *cells)
        for key in keys
        for cells in [[brief(t[key]) if key in t else NOTHING for t in told]]
        if len(set(cells)) > 1
    ]
    return Table(("Key", *(s.label for s in stories)), tuple(rows))


def _told(story: Story) -> dict[str, object]:
    record = story.record
    zero = {"zero_optimization": mapping(record.ds_config.get("zero_optimization"))}
    ran = {name: record.run[name] for name in ("world_size", "zero_stage", "backend") if name in record.run}
    return (
        flat(record.config)
        | {f"ds_config: {k}": v for k, v in flat(zero).items()}
        | {f"run: {name}": value for name, value in ran.items()}
    )


def missing_words(story: Story) -> list[str]:
    """Notes on the folder itself, in sentences."""
    return [sentence(brief(note)) for note in story.record.notes]
