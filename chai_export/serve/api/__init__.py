"""The engine over HTTP, in OpenAI's form. Import only with the packages of chai-export[serve]."""
