"""The browser demo.

`sessions.py` keeps images and conversations and calls the `Predictor`, `server.py` handles HTTP requests, `page/` is
the web page. An example request:

    POST /api/ask {"session": "Jt0Z...", "text": "What is <Prompt0>?", "regions": [{"box": [10, 20, 200, 180]}]}
"""
