"""Stop tokens: what ends a completion. Knows nothing of weights.

A checkpoint says it in up to three files, which do not always agree: its generation settings, its tokenizer, and its
chat template, by what it puts behind an assistant's message. A token of any of them ends a completion.
"""

from __future__ import annotations

from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, UserError

# What an assistant says in the conversation that is rendered: no template treats it as anything but text.
MARKER = "wherethisends"


def stop_tokens(configured: Any, tokenizer: Any, vocabulary: int) -> list[int]:
    """The tokens that end a completion, in order, each once.

    configured: eos_token_id of the generation settings. tokenizer: None where there is none to ask. vocabulary: how
    many tokens the model can sample; what only the tokenizer knows beyond them never comes.

    Raises:
        UserError: there is none, or the settings name what is no token.
    """
    named = [] if configured is None else configured if isinstance(configured, list) else [configured]
    wrong = [token for token in named if type(token) is not int or not 0 <= token < vocabulary]
    if wrong or configured == []:
        raise UserError(
            f"The model's generation settings have eos_token_id {configured!r}. It must be a token, a whole number "
            f"from 0 to {vocabulary - 1}, or a list of such. Mend its generation_config.json, or its config.json where "
            "there is none."
        )
    known = [] if tokenizer is None else [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    stop = [*named, *(token for token in known if token is not None and token < vocabulary)]
    if not stop:
        raise UserError(
            "Neither the model's generation settings, nor its tokenizer, nor its chat template say which token ends a "
            "completion, so none could end. Put an eos_token_id into its generation_config.json."
        )
    return list(dict.fromkeys(stop))


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right behind an assistant's message, if there is one; else the one
    that the user's next message begins with, which is how models such as GLM-4 end theirs."""
    asked, said = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": MARKER}
    own = _behind_marker(tokenizer, [asked, said])
    return _behind_marker(tokenizer, [asked, said, asked]) if own is None else own


def _behind_marker(tokenizer: Any, conversation: list[dict[str, str]]) -> int | None:
    """The special token right behind what the assistant says in a conversation; None if there is none."""
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    except WHAT_USER_CODE_RAISES:  # a template is the model's own code; what it refuses to render ends nothing
        return None
    _, found, behind = text.rpartition(MARKER)
    if not found:
        return None
    behind = behind.lstrip()
    fitting = [token for token in special if token.strip() and behind.startswith(token)]
    return special[max(fitting, key=len)] if fitting else None
