"""Around a run: the command line, refusals, sweeps, pipelines, a look before the spend, publishing after."""
