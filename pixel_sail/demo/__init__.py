"""A page to ask a model in a browser.

`sessions.py` keeps what users look at and asks the `Predictor`, `server.py` answers the browser, `page/` is what it
shows. One question as an example:

    POST /api/ask {"session": "Jt0Z...", "text": "What is <Prompt0>?", "regions": [{"box": [10, 20, 200, 180]}]}
"""
