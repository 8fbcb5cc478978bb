"""Stand-ins for backends and the database, for tests of what chooses between them."""

from __future__ import annotations

from types import SimpleNamespace

from lla_compile import storage
from lla_compile.key import Bucket
from lla_compile.lowering import lower
from lla_compile.plans import KernelConfig, Source


class FakeBackend:
    """Records what it is asked to run, as (inputs, wanted) in ``calls``; its outputs are zeros.

    They are made once for each ``wanted``, so that its own cost is next to nothing. ``refuses`` is why it cannot run a
    spec, or a function of the spec that says so.
    """

    def __init__(self, name, *, refuses=None, infeasible=None, kernel_hash="hash"):
        self.name, self.refuses, self.too_big, self.kernel_hash = name, refuses, infeasible, kernel_hash
        self.bound, self.calls = [], []

    def unsupported(self, spec, device):
        return self.refuses(spec) if callable(self.refuses) else self.refuses

    def alternatives(self, spec, device):
        return ()

    def default_config(self, spec, device):
        return KernelConfig(self.name, "fused", 64, 64, 32)

    def infeasible(self, spec, config, device):
        return self.too_big

    def source_hash(self, spec, config):
        return self.kernel_hash

    def bind(self, plan):
        spec, made = plan.spec, {}
        program, packed = lower(spec.op, spec.phase), spec.num_sequences is not None
        self.bound.append(plan)

        def zeros(inputs, name):
            tensors = (inputs[x] for x in ("q", "k", "v"))
            return storage.layout(program, name, *tensors, spec.precision, packed).empty(inputs["q"]).zero_()

        def executable(inputs, wanted):
            self.calls.append((inputs, wanted))
            if wanted not in made:
                made[wanted] = {name: zeros(inputs, name) for name in wanted}
            return made[wanted]

        executable.workspace_numel = 12
        return executable


def entry_of(backend, *, kernel_hash="hash", block_q=128, tuned=Bucket(4096, 32), **config):
    """A database entry that tests recognise by its ``block_q``."""
    plan = KernelConfig(backend, "split", block_q, 64, 24, **config)
    return SimpleNamespace(config=plan, tuned=tuned, search={"kernel_hash": kernel_hash})


def lookup_in(*entries, source=Source.EXACT, distance=0.0):
    """A look-up that offers ``entries`` in order; the queries that it got are in its attribute ``queries``."""
    queries = []

    def lookup(key, bucket, seqlen, batch_heads, device, reject, cg_max_iters=None):
        queries.append((key, bucket, seqlen, batch_heads, device))
        refused = []
        for entry in entries:
            why = reject(entry.config, entry)
            if why is None:
                return SimpleNamespace(entry=entry, source=source, distance=distance, reason="found")
            refused.append(why)
        reason = "refused " + "; ".join(refused) if refused else "nothing is tuned"
        return SimpleNamespace(entry=None, source=Source.HEURISTIC, distance=0.0, reason=reason)

    lookup.queries = queries
    return lookup
