"""Where every millisecond goes: stamps, percentiles, verdicts, traces and pages of one run."""
