"""A calibrated folder as it stands, on its way to the Hub; and the cards that are on the Hub already."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from .calibrators.loading import calibrator_folder, load_with_record
from .calibrators.storage import weights_sha256
from .card_text import CARD_NAME, check_card, merge_cards, read_model_card, rename_card
from .folders import CONFIGS


PICKLES = (".bin", ".pt", ".pkl", ".ckpt", ".pth")


class Pushed(NamedTuple):
    """What `push_folder` did."""

    commit_url: str
    kept_card: bool  # the repo had a card already, whose text is still there


def push_folder(folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> Pushed:
    """Pushes a folder that `save_calibrated` wrote to the Hub as it is, in one commit; no model is loaded.

    Only the card changes on the way: its title and the lines that load the model have the repo's name, and where the
    repo has a card already, that one's text is kept and our section is put into it.

    Args:
        folder (`Path`): as `check_calibrated_folder` wants it.
        repo_id (`str`): such as `"me/my-model"`, or `"my-model"` for your own; made if it is missing.
        private (`bool`, *optional*): of a repo that is made.
        token (`str`, *optional*): by default the one that the machine is logged in with.
    Returns:
        [`Pushed`]: the commit's URL, and whether there was a card already.
    Raises:
        FileNotFoundError, ValueError: as `check_calibrated_folder`; or the card of the repo is malformed.
        OSError: the Hub refuses, or somebody else has changed the repo meanwhile. Nothing has been changed then, but a
            repo may have been made.
        RuntimeError: the Hub client gave a file's upload up; so too. A connection that is lost elsewhere is an error
            of the client's own HTTP library.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_calibrated_folder(folder)
    card = read_model_card(folder)
    api = HfApi(token=token)
    if "/" not in repo_id:  # the Hub takes an upload by the full name only, and so do the card's lines
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    card = card and rename_card(card, repo_id)
    api.create_repo(repo_id, private=private, exist_ok=True)
    parent = api.model_info(repo_id).sha
    existing = read_hub_card(repo_id, revision=parent, token=token)
    contents = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if card is not None:
        contents[CARD_NAME] = (card if existing is None else merge_cards(existing, card)).encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload calibrated model", parent_commit=parent
    )  # of that parent: what somebody has written since is not undone
    return Pushed(str(commit.commit_url), existing is not None)


def check_calibrated_folder(folder: Path) -> None:
    """Checks all that can be known of a calibrated model without loading it.

    Raises:
        FileNotFoundError: it is no folder, or holds no calibrator, no config or no weights.
        ValueError: a calibrator file is damaged, does not say how it is applied, or was saved with other weights; the
            card is malformed; or there are pickles, which run code when they are loaded.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder: got {folder}; allowed is a folder that hf-calib fit or save_calibrated wrote"
        )
    _, record = load_with_record(calibrator_folder(folder))
    if record.get("applied") not in ("attached", "folded"):
        raise ValueError(
            f'folder: {folder} holds a calibrator with applied={record.get("applied")!r}; allowed are "attached" and '
            '"folded", as save_calibrated writes them'
        )
    if not any((folder / name).is_file() for name in CONFIGS):
        raise FileNotFoundError(f"folder: {folder} holds no {' and no '.join(CONFIGS)}; allowed are whole models")
    if pickles := [path.relative_to(folder).as_posix() for path in _files(folder) if path.suffix in PICKLES]:
        raise ValueError(f"folder: {folder} holds {', '.join(pickles)}; allowed are no pickles: take them out first")
    card_of(str(folder))
    present = weights_sha256(folder)
    if present is None:
        raise FileNotFoundError(f"folder: {folder} holds no weights; allowed are models in safetensors")
    if record.get("weights") not in (None, present):
        raise ValueError(
            f"folder: the weights in {folder} are not those that the calibrator was saved with; fit it again"
        )


def read_hub_card(repo_id: str, *, revision: str | None = None, token: str | None = None) -> str | None:
    """The text of a Hub repo's `README.md`; None where the repo has none.

    Raises:
        ValueError: it is not UTF-8.
        OSError: the repo cannot be read, or is not in the cache and the Hub is out of reach.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_model_card(Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)).parent)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def card_of(model: str) -> str | None:
    """The card of a model, by folder or Hub id, that our section can be put into; None where it has none.

    Raises:
        ValueError: it is malformed.
        OSError: as `read_hub_card`.
    """
    card = read_model_card(Path(model)) if Path(model).is_dir() else read_hub_card(model)
    if card is not None:
        check_card(card)
    return card


def card_to_keep(model: str) -> str | None:
    """As `card_of`, for the card of what is made of that model.

    Warns:
        UserWarning: there is one that cannot be kept, or may be one that cannot be read.
    """
    try:
        return card_of(model)
    except (ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{model}: the new card does not keep the text of its card ({reason})", stacklevel=2)
        return None


def _files(folder: Path) -> list[Path]:
    """The files that are to be pushed, in order of name; what git and downloads keep for themselves is left out."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [folder / name for name in filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS)]
