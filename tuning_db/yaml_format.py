"""The text of a database file: YAML in which each part of an entry is one line."""

from __future__ import annotations

from functools import lru_cache


def load(text: str):
    """Parse a file's text; dates stay text.

    Raises:
        ValueError: it is not YAML.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def dump(document: dict) -> str:
    """The text of :meth:`Document.to_dict`; the same document gives the same text."""
    import yaml

    head = {name: value for name, value in document.items() if name != "entries"}
    parts = [_block(head, yaml)]
    if not document["entries"]:
        parts.append("entries: []\n")
    else:
        parts.append("entries:\n")
    for entry in document["entries"]:
        lines = _block(entry, yaml).splitlines(keepends=True)
        parts.extend(("- " if i == 0 else "  ") + line for i, line in enumerate(lines))
    return "".join(parts)


def _block(mapping: dict, yaml) -> str:
    """One line for each item, its value in flow style."""
    lines = []
    for name, value in mapping.items():
        flow = yaml.dump(value, Dumper=_dumper(), default_flow_style=True, sort_keys=False, width=float("inf"))
        lines.append(f"{name}: {flow.rstrip().removesuffix('...').rstrip()}\n")
    return "".join(lines)


@lru_cache(maxsize=None)
def _dumper():
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes every value out, so that no anchor ties two entries together."""

        def ignore_aliases(self, data):
            return True

    return Dumper


@lru_cache(maxsize=None)
def _loader():
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """Leaves dates as text: they are compared and written back as they are."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    return Loader
