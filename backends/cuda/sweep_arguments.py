"""The arguments of a launch of printed sweeps: one structure, as C++ declares it and as Python packs it."""

from __future__ import annotations

from dataclasses import dataclass

from lla_compile.sweeps import SweepList

_POINTERS = {"input": "uint16_t", "float32": "float", "int32": "int32_t"}


@dataclass(frozen=True)
class Field:
    """One member of the arguments: its C++ declaration, and its format for :mod:`struct`."""

    name: str
    declaration: str
    format: str


# In which of the loops each group of rows is, where launches are their turns; follows the other members.
LOOP_FIELD = Field("loop_of_group", "int32_t* loop_of_group", "Q")


def argument_fields(program: SweepList, state: tuple[str, ...]) -> tuple[Field, ...]:
    """The members: inputs, outputs, state that is no output, then strides, numbers and counts, and where packed
    sequences end and which tile runs when."""

    def pointer(name: str, of: str) -> Field:
        return Field(name, f"{of}* {name}", "Q")

    inputs = (*program.row_inputs, *program.col_inputs)
    fields = [pointer(name, "const uint16_t") for name in inputs]
    for name, stored in program.outputs.items():
        fields.append(pointer(name, "uint16_t" if name in program.rounded else _POINTERS[stored]))
    own = (name for name in state if name not in program.outputs)
    fields += [pointer(name, "uint16_t" if name in program.rounded else "float") for name in own]
    fields += [pointer(f"{name}_pointer", "const float") for name in ("scale", *program.row_scalars)]
    results = [name for name, stored in program.outputs.items() if stored == "input"]
    strided = (*inputs, *results, *program.row_scalars)
    fields += [Field(f"{name}_strides", f"int64_t {name}_strides[3]", "3q") for name in strided]
    fields.append(Field("state_rows", "int64_t state_rows", "q"))
    numbers = ("scale", *program.row_scalars, *program.scalars)
    fields += [Field(name, f"float {name}", "f") for name in numbers]
    counts = ("batch_heads", "num_heads", "group_size", "heads_per_group", "seqlen_q", "seqlen_k", "window")
    fields += [Field(name, f"int32_t {name}", "i") for name in (*counts, "num_sequences")]
    fields += [pointer(name, "const int32_t") for name in ("cu_seqlens_q", "cu_seqlens_k")]
    fields.append(pointer("row_tiles", "int32_t"))
    return tuple(fields)


def arguments_text(program: SweepList, fields: tuple[Field, ...], loops: int) -> str:
    """The header that declares them."""
    lines = [f"// Printed: the arguments of the sweeps of {program.name}.", "#pragma once", "#include <ptx.cuh>", ""]
    lines += [f"constexpr int LOOPS = {loops}, ROW_INPUTS = {len(program.row_inputs)};", "", "struct SweepArguments {"]
    lines += [f"    {field.declaration};" for field in fields]
    lines += ["};", "", "// The inputs that a block holds rows of.", "struct RowInput {"]
    lines += ["    const uint16_t* base;", "    const int64_t (&strides)[3];", "};", ""]
    lines += ["DEVICE RowInput row_input(const SweepArguments& g, int i) {"]
    first, *others = program.row_inputs
    lines += [f"    if (i == {i}) return {{g.{name}, g.{name}_strides}};" for i, name in enumerate(others, 1)]
    return "\n".join([*lines, f"    return {{g.{first}, g.{first}_strides}};", "}", ""])
