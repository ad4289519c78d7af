"""What a test process does once, or less of, because no test sees the difference."""

import gc
from contextlib import contextmanager
from pathlib import Path

PICTURES = ("curves.png", "doctor.png")


def parse_yaml_once() -> None:
    """OmegaConf parses the same files anew for each composition, by a parser in Python."""
    import yaml
    from omegaconf import _utils

    load, loader, parsed = yaml.load, _utils.get_yaml_loader(), {}

    def load_once(stream, Loader):
        if Loader is not loader:
            return load(stream, Loader)
        text = stream if isinstance(stream, str) else stream.read()
        if text not in parsed:
            if text is not stream:
                stream.seek(0)  # whose name an error shows
            parsed[text] = load(stream, Loader)
        return parsed[text]  # of which OmegaConf makes nodes of its own

    yaml.load, _utils.get_yaml_loader = load_once, lambda: loader


def collect_less() -> None:
    """What is imported stays; a full collection that looks at all of it takes half a second, and TRL asks for some."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@contextmanager
def pictures_sketched():
    """A run's own pictures are built, and an empty one is saved: their layout takes longer than two steps."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def save(figure, path, **options):
        own = isinstance(path, str | Path) and Path(path).name in PICTURES
        draw(Figure(figsize=(1, 1)) if own else figure, path, **options)

    Figure.savefig = save
    try:
        yield
    finally:
        Figure.savefig = draw
