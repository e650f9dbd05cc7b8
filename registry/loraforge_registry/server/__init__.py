"""A hub over a store, for clients that know only the Hugging Face Hub, and a page for people.

``app.create`` joins the parts; ``run.serve`` runs it. Needs the extra ``loraforge[server]``.
"""
