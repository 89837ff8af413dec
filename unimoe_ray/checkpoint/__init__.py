"""States of unfinished runs: what a run that was killed goes on from, at any world size and placement of experts.

    states/<stage or stage-run>/step-00000040-3fa9c2/
        part-00000-of-00002.safetensors     what rank 0 updates: fragments of parameters and their moments, fp32
        part-00001-of-00002.safetensors
        manifest.json                       written last: with it, and only with it, the state counts

Every rank writes what it has, by parameter names with global expert ids, and reads what it needs. The format is our
own: ``torch.distributed.checkpoint`` keeps its index in a pickle, or none (``HuggingFaceStorageWriter``), has no
checksums, takes no pieces of flattened parameters, and agrees on each save by collectives, which hang when a rank dies.
"""
