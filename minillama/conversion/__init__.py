"""Conversions between checkpoints. Each streams tensor by tensor from directory to directory.

    meta            meta_to_hf, hf_to_meta        Meta's layout
    megatron        hf_to_megatron, …             the files of Megatron's ranks
    delta           apply_delta, make_delta       differences from a base (Vicuna)
    merge           merge_lora                    adapters into their base
    checksums       write_manifest, check         is it the same model?
    vocabulary      merge_tokenizers              a larger tokenizer.model
    dataset         tokenize_files                raw files to a tokenized data set

Each function returns a dataclass; `str()` of it is what convert.py prints.
"""
