"""From raw files to batches: what one training record goes through, in the order of the files.

    sources      names            ->  files
    records      a file           ->  records: JSON values with their place in the file
    formats      a record         ->  a document: a conversation, or a plain text
    encode       a document       ->  ids and mask
    tokenize     all of that, in several processes (workers)
    memmap       ids and masks    ->  a data set on disk, and back
    token_cache  what --data says ->  an open data set, made once
    windows      documents        ->  training windows of at most max_length tokens
    batches      a step number    ->  the batch of this step
    show         a batch          ->  text to look at

megatron opens the data sets of AscendSpeed and Megatron; demo makes data to try things with.
"""
