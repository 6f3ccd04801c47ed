"""All benchmarks, one after another."""

from benchmarks import attention

attention.main()
