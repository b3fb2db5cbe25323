"""Chat: what a run has learned, tried by hand: the base and the trained policy answer the same prompt. Trains nothing.

RUN, --checkpoint -> trained.py: the policy, its tokenizer, the system prompt that its task asks with
                  -> voice.py: an answer, told token by token as it is written; with the adapter or without
                  -> dialogue.py: the conversation with each, which goes its own way, and the commands (/reset ...)
                  -> screen.py: answers as they come, side by side where there is room; or JSON
__main__.py       the command: one prompt, or one after the other
"""
