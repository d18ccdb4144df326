"""`ballad push`: a model directory to the Hub, with a demo Space if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .options import OptionParser, add_dataclass, build, option


@dataclass
class PushArguments:
    """What to push, and where to."""

    folder: str
    repo_id: str
    private: bool = option("create a private repository", False)
    with_code: bool = option("upload the model's code too, for use without this package", False)
    with_handler: bool = option("upload a handler for Inference Endpoints, and the code", False)
    revision: str | None = option("an existing branch; default: the main one")
    space: bool = option("push a demo too: a Space of the same name, with the model's code", False)


def main(options: Sequence[str]) -> None:
    parser = OptionParser("push", "Push a model directory to the Hub.")
    parser.add_argument("folder", metavar="FOLDER", help="model directory, such as the output folder of a run")
    parser.add_argument("repo_id", metavar="REPOSITORY", help="owner/name, or a name in your own namespace")
    add_dataclass(parser, PushArguments, "Push")
    parsed = vars(parser.parse_args(options))
    run(build(PushArguments, parsed, folder=parsed["folder"], repo_id=parsed["repo_id"]))


def run(options: PushArguments) -> None:
    """Push the model, and the Space after it."""
    from ..hub.push import push_model_directory

    private = options.private or None
    repository = push_model_directory(
        options.folder,
        options.repo_id,
        private=private,
        with_code=options.with_code or options.space,  # the Space runs without this package
        with_handler=options.with_handler,
        revision=options.revision,
    )
    print(f"Pushed to {repository}")
    if options.space:
        from ..hub.space import push_space

        print(f"Pushed the demo to {push_space(repository.repo_id, repository.repo_id, private=private)}")
