"""What tests share: tiny models, references written from definitions, servers, processes, a browser."""
