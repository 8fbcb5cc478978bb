"""A search as one HTML page that needs no network: figures by Optuna and plotly, and tables."""

from __future__ import annotations

import html
import math
from collections import Counter
from typing import TYPE_CHECKING, Iterator, Sequence

import optuna

from lla_compile.tuner.outcome import Kind, Outcome
from lla_compile.tuner.search import evaluated, failures, ranked
from lla_compile.tuner.study import Decision, Record, read_decision, read_records
from lla_compile.tuning_db.short import short

if TYPE_CHECKING:
    import plotly.graph_objects as go

_BEST_SHOWN = 10
_MESSAGES_SHOWN = 10

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin-top: 2.2em; }
table { border-collapse: collapse; } th, td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; } .figure { overflow-x: auto; }
"""


def page(study: optuna.Study) -> str:
    """The report of a search.

    Raises:
        ValueError: the study is not one of this tuner's, or nothing has been tried yet.
        ImportError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    try:
        records = read_records(study)
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"study {study.study_name!r} is not one of this tuner's") from None
    if not records:
        raise ValueError(f"study {study.study_name!r} has no finished trial yet")
    body = "\n".join(_sections(study, records))
    title = html.escape(study.study_name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f"<script>{get_plotlyjs()}</script></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _sections(study: optuna.Study, records: Sequence[Record]) -> Iterator[str]:
    best = ranked(records)
    yield _summary(records, read_decision(study), best)
    yield "<h2>Best configurations</h2>"
    yield _best_table(best[:_BEST_SHOWN]) if best else "<p>No configuration was correct.</p>"
    yield "<h2>Accuracy and time</h2>"
    yield "<p>Below the line is what may win. Wrong configurations are not timed.</p>"
    yield _html(_accuracy_time(records))
    yield "<h2>Failures</h2>"
    yield _failures(records)
    if len(best) < 2:
        yield "<p>With fewer than two correct configurations there is nothing to compare.</p>"
        return
    yield "<h2>Time against each parameter</h2>"
    names = _parameters(study)
    for backend, parameters in names.items():
        yield f"<h3>{html.escape(backend)}</h3>" if len(names) > 1 else ""
        slices = optuna.visualization.plot_slice(study, params=parameters, target_name="ms")
        yield _html(slices.update_yaxes(type="log").update_layout(title=None))
    yield "<h2>Importance of each parameter</h2>"
    for backend, parameters in names.items():
        yield _importance(study, parameters)
    yield "<h2>Progress</h2>"
    history = optuna.visualization.plot_optimization_history(study, target_name="ms")
    yield _html(history.update_yaxes(type="log").update_layout(title=None))


def _summary(records: Sequence[Record], decision: Decision | None, best: Sequence[Record]) -> str:
    failed = ", ".join(f"{count} {kind}" for kind, count in failures(records).items() if count) or "none"
    lines = [f"{evaluated(records)} configurations tried; failed: {failed}."]
    if decision is not None:
        outcome = decision.outcome
        gain = (
            f"{decision.default_ms / outcome.median_ms:.2f} times as fast as the heuristic default"
            if decision.default_ms
            else "the heuristic default fails"
        )
        lines.append(
            f"Winner on {decision.date[:10]}: {short(decision.config)}, {outcome.median_ms:.4g} ms, {gain}; "
            f"error {_error(outcome)}."
        )
    elif best:
        lines.append("The search has not ended; the best so far is below.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _best_table(best: Sequence[Record]) -> str:
    rows = (
        (str(place), short(r.config), f"{r.outcome.median_ms:.4g}", f"{r.outcome.spread:.1%}", _error(r.outcome),
         str(r.number))
        for place, r in enumerate(best, 1)
    )  # fmt: skip
    return _table(("", "plan", "ms", "spread", "error / limit", "trial"), rows)


def _accuracy_time(records: Sequence[Record]) -> go.Figure:
    """Error over its limit against time; beside it, without a time, what was wrong."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.85, 0.15], horizontal_spacing=0.02)
    correct = ranked(records)
    times = [record.outcome.median_ms for record in correct]
    share = [_share(record.outcome) for record in correct]
    texts = [short(record.config) for record in correct]
    figure.add_trace(go.Scatter(x=times, y=share, text=texts, mode="markers", name="correct"), 1, 1)
    front = _front(correct)
    figure.add_trace(
        go.Scatter(
            x=[record.outcome.median_ms for record in front], y=[_share(record.outcome) for record in front],
            text=[short(record.config) for record in front], mode="lines+markers", name="Pareto front",
            line={"shape": "hv"},
        ), 1, 1,
    )  # fmt: skip
    wrong = list({r.config: r for r in records if r.outcome.kind is Kind.WRONG and r.outcome.error}.values())
    figure.add_trace(
        go.Scatter(
            x=["wrong"] * len(wrong), y=[_share(r.outcome) for r in wrong], text=[short(r.config) for r in wrong],
            mode="markers", name="wrong", marker={"symbol": "x"},
        ), 1, 2,
    )  # fmt: skip
    figure.add_hline(y=1.0, line={"dash": "dash", "color": "#b00"})
    figure.update_xaxes(title="ms", type="log", row=1, col=1)
    figure.update_yaxes(type="log")
    figure.update_yaxes(title="error / limit", row=1, col=1)
    return figure


def _front(correct: Sequence[Record]) -> list[Record]:
    """Of configurations in order of time, those that no faster one matches in accuracy."""
    front: list[Record] = []
    for record in correct:
        if not front or _share(record.outcome) < _share(front[-1].outcome):
            front.append(record)
    return front


def _failures(records: Sequence[Record]) -> str:
    import plotly.graph_objects as go

    counts = failures(records)
    if not any(counts.values()):
        return "<p>None.</p>"
    figure = go.Figure(go.Bar(x=list(counts), y=list(counts.values()), text=list(counts.values())))
    figure.update_yaxes(title="configurations")
    failed = {record.config: record.outcome for record in records if not record.outcome.ok}
    messages = Counter((outcome.kind.value, outcome.message) for outcome in failed.values())
    rows = ((str(n), kind, message) for (kind, message), n in messages.most_common(_MESSAGES_SHOWN))
    return _html(figure.update_layout(height=300)) + _table(("count", "kind", "message"), rows)


def _parameters(study: optuna.Study) -> dict[str, list[str]]:
    """The parameters that varied among correct configurations, by backend."""
    values: dict[str, set] = {}
    trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    varied = [name for name, seen in values.items() if len(seen) > 1 and "." in name]
    backends = dict.fromkeys(name.partition(".")[0] for name in varied)
    return {backend: [name for name in varied if name.startswith(f"{backend}.")] for backend in backends}


def _importance(study: optuna.Study, parameters: list[str]) -> str:
    # Optuna's other evaluators need scikit-learn.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        figure = optuna.visualization.plot_param_importances(study, evaluator=evaluator, params=parameters)
    except (ValueError, RuntimeError) as error:
        return f"<p>Not enough trials to tell ({html.escape(' '.join(str(error).split()))}).</p>"
    return _html(figure.update_layout(title=None))


def _share(outcome: Outcome) -> float:
    """Error over its limit; on a logarithmic axis no error at all is shown as the least that there is."""
    return max(outcome.error / outcome.error_limit, 1e-9) if math.isfinite(outcome.error_limit) else 1e-9


def _error(outcome: Outcome) -> str:
    return f"{outcome.error:.1e} / {outcome.error_limit:.1e}"


def _table(header: Sequence[str], rows) -> str:
    def row(cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _html(figure: go.Figure) -> str:
    figure.update_layout(template="plotly_white", margin={"t": 30})
    return f'<div class="figure">{figure.to_html(full_html=False, include_plotlyjs=False)}</div>'
