"""The Hub: adapters from it by name, results to it. The only importer of huggingface_hub."""
