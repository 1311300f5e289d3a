"""Pushing a compressed model to the hub, with its card."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from bitpress.checkpoints.directory import CARD_FILE, SECOND_CARD, is_own_card
from bitpress.ranks import is_first

logger = logging.getLogger(__name__)


def push(  # noqa: PLR0913
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
    **options: Any,
) -> str:
    """Upload what ``model.save_pretrained`` writes.

    transformers' own ``push_to_hub`` puts its generic card in the place of the model's. A card that is in the
    repository and not bitpress's own stays; the new one is README.bitpress.md then.

    Args:
        model: what ``oneshot`` returned.
        repo_id: "name", or "organization/name"; the repository is created if there is none.
        commit_message: "Upload model" by default.
        commit_description: of the commit.
        private: whether a new repository is.
        token: of the hub; by default the one that is logged in.
        revision: branch to push to, created if there is none.
        create_pr: open a pull request instead of a commit.
        tags: more tags for the card.
        **options: of ``save_pretrained``.

    Returns:
        The commit's address; nothing in all processes but the first, which pushes.
    """
    if not is_first():
        return ""
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model.save_pretrained(path, **options)
        card = path / CARD_FILE
        if card.is_file():
            _tag(
                card, [tags] if isinstance(tags, str) else [*(tags or ()), *(getattr(model, "model_tags", None) or ())]
            )
            _spare(api, repo, revision, card)
        found = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(found.commit_url)


def _tag(file: Path, tags: list[str]) -> None:
    if tags:
        card = ModelCard.load(file)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
        card.save(file)


def _spare(api: HfApi, repo: str, revision: str | None, card: Path) -> None:
    """Leave a card of the user's where it is."""
    if not api.file_exists(repo, CARD_FILE, revision=revision):
        return
    if not is_own_card(Path(api.hf_hub_download(repo, CARD_FILE, revision=revision))):
        card.replace(card.with_name(SECOND_CARD))
        logger.warning("the README.md of %s stays as it is: the model card is %s, beside it.", repo, SECOND_CARD)
