"""The decoder, in files that can be read one by one: begin with `llama.py`, then `ops.py` and `views/`.

Letters of shapes, in names such as `q_BTNH`:

    B batch    T query time    S key time    N query heads    K key/value heads    G = N / K    H head dim
    D embed    F mlp           V vocabulary  L lanes          P pages              R pages of a row    C new positions

`...` stands for any leading axes: rows of a batch `[B, T]`, lanes `[L]`, or one sequence `[T]`.
"""
