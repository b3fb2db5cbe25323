"""Export: what a run has learned, for other programs. Knows nothing of training.

    RUN, --checkpoint -> source.find: the adapter, its base, and what that was trained as
                      -> adapter.py: PEFT's files, with the tokenizer        (by itself)
                      -> merged.py: one model of 16 bits, shard by shard     (--merged)
                         llama_cpp.py: that as a GGUF                        (--merged --gguf)
                      -> lora_gguf.py: the adapter as a GGUF                 (--gguf)

Everything is written into a new folder, which is whole or not there (folder.py).
"""
