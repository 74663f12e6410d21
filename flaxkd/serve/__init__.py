"""Models over HTTP: requests and their limits (requests), the queue (jobs), the thread that draws (device), the
application and flaxkd's own API (app), those of OpenAI and A1111 (openai_api, a1111_api), the page (page.html)."""
