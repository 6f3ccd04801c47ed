"""All benchmarks, then the page that shows them. Takes hours; `make bench` is the comparison with peers alone."""

from benchmarks import (
    attention,
    data_report,
    dpo,
    memory,
    overhead,
    parity,
    quantised,
    report,
    serving,
    startup,
    tokenize,
)

attention.main()
for benchmark in (dpo, parity, memory, quantised, tokenize, data_report, overhead, startup, serving):
    print(f"\n== {benchmark.__name__}\n")
    benchmark.main([])
report.main()
