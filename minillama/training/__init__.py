"""How a model is trained: settings become a run, and the loop takes its steps.

    run.py               the run: everything that training needs, built and checked once
      run_directory.py     what may be continued, what is refused
      settings.py          which settings may differ, between runs and between ranks
      inputs.py            fingerprints of data, tokenizer, base and adapter
      data_building.py     the batches of every step
      architecture.py      the shape of the model
      model_building.py    the model, its adapters
    trainer.py           the loop
      stages.py            the same over the stages of a pipeline
      evaluation.py        the loss of the evaluation data
      schedule.py          the learning rate
      metrics.py           the progress bar, metrics.jsonl and trainer_log.jsonl
      saving.py            checkpoints and final/
      finite.py            NaN and infinity
      signals.py           requests to stop
    summary.py           the figures of a run;  messages.py: the lines that are printed
    estimate.py          the bytes that a rank of a grid needs
    dry_run.py           what a run will need, without starting it

Read them in this order.
"""
