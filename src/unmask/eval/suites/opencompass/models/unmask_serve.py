"""The model that `unmask serve` serves, for `opencompass --models unmask_serve`: a file that opencompass reads.

Owns how opencompass asks. What it asks, and where, is in the environment: UNMASK_URL, UNMASK_MODEL, UNMASK_API_KEY, and
UNMASK_TOKENIZER, a folder with the tokenizer that measures prompts (without it: GPT-4's, which is downloaded).
"""

import os

models = [
    {
        "type": "opencompass.models.OpenAISDK",
        "abbr": os.environ["UNMASK_MODEL"].replace("/", "--"),
        "path": os.environ["UNMASK_MODEL"],
        "openai_api_base": os.environ["UNMASK_URL"],
        "key": os.environ.get("UNMASK_API_KEY", "none"),
        "tokenizer_path": os.environ.get("UNMASK_TOKENIZER", "gpt-4"),
        "meta_template": {
            "round": [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}],
            "reserved_roles": [{"role": "SYSTEM", "api_role": "SYSTEM"}],
        },
        "temperature": 0,
        "max_seq_len": 8192,
        "max_out_len": 2048,
        "query_per_second": 100,
        "batch_size": 8,
    }
]
