"""mini-5: five tasks, one for each dimension of the LLaDA2.0 report, from question generators that need no download."""
