"""The benchmarks behind the README's claims: `python -m pneumo.bench NAME`."""
