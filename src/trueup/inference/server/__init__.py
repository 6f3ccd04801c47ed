"""`trueup serve`: a policy, its base, adapters and reward models behind OpenAI's protocol (extra `serve`)."""
