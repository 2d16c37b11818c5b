"""Which work, where, in what order: shards, plan, driver, run folder, report. Ray lives only here."""
