"""Secrets of every known form, each with a part that must not be seen anywhere."""

JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = """-----BEGIN RSA PRIVATE KEY-----
MIIEpAIBAAKCAQEA7bq0Zp2k9mQ3xvJ0
y8mV5s0P9hQkX1b3n5t7w9z0a2c4e6g8
-----END RSA PRIVATE KEY-----"""

# Joined from halves, so that no scanner takes this file for a leak.
VALUES = {
    "jwt": (JWT, "dozjgNryP4J3jVmNHl0w5N"),
    "jwt-unsigned": ("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.", "eyJzdWIiOiJhZGEifQ"),
    "bearer": ("Bearer abcdefghijklmnop", "abcdefghijklmnop"),
    "bearer-lower": ("bearer\t0123-456.789~x", "0123-456.789"),
    "bearer-in-a-query": ("Bearer+abcdefghijk", "abcdefghijk"),
    "dpop": ("DPoP Kz~8mXK1EalYznwH", "Kz~8mXK1EalYznwH"),
    "basic": ("Basic YWRhOmxvdmVsYWNl", "YWRhOmxvdmVsYWNl"),
    "stripe-live": ("sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc", "4eC39HqLyjWDarjtT1zdp7dc"),
    "stripe-restricted": ("rk_" + "test_4eC39HqLyjWDarjtT1zdp7dc", "4eC39HqLyjWDarjtT1zdp7dc"),
    "own-key": ("sk_" + "live_0123456789ab_ABCDEFGHabcdefgh01234567_abcdef", "ABCDEFGHabcdefgh01234567"),
    "webhook": ("whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
    "aws": ("AKIA" + "IOSFODNN7EXAMPLE", "IOSFODNN7EXAMPLE"),
    "aws-session": ("ASIA" + "IOSFODNN7EXAMPLE", "IOSFODNN7EXAMPLE"),
    "github": ("ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a", "16C7e42F292c6912E7710c838347Ae178B4a"),
    "github-fine": ("github_pat_" + "11ABCDEFG0abcdefghijkl_mnopqrstuvwx", "11ABCDEFG0abcdefghijkl"),
    "openai": ("sk-" + "proj-abcdEFGH1234ijklMNOP5678", "abcdEFGH1234ijklMNOP5678"),
    "anthropic": ("sk-" + "ant-api03-abcdEFGH1234ijklMNOP", "api03-abcdEFGH1234ijklMNOP"),
    "google": ("AIza" + "SyA1234567890abcdefghijklmnopqrstuv", "SyA1234567890abcdefghijklmnopqrstuv"),
    "slack": ("xoxb" + "-123456789012-abcdefABCDEF", "123456789012-abcdefABCDEF"),
    "pem": (PEM, "MIIEpAIBAAKCAQEA7bq0Zp2k9mQ3xvJ0"),
    "pem-cut": (PEM[:70], "MIIEpAIBAAKCAQEA7bq0Zp2k9mQ3xvJ0"),
    "url": ("postgres://app:h8nter2pw@db.internal:5432/main", "h8nter2pw"),
    "url-no-user": ("redis://:h8nter2pw@cache:6379/0", "h8nter2pw"),
    "url-at": ("amqp://u:p@h8nter2pw@mq/", "h8nter2pw"),
    "url-slash": ("amqp://u:a/h8nter2pw@mq/", "h8nter2pw"),
    "url-token": ("https://abcdef0123456789abcdef@git.example.com/x.git", "abcdef0123456789abcdef"),
    "query": ("/login?user=ada&password=h8nter2pw&next=/", "h8nter2pw"),
    "query-encoded-name": ("/login?api%5Fkey=h8nter2pw", "h8nter2pw"),
    "query-encoded-value": ("/cb?to=postgres%3A%2F%2Fapp%3Ah8nter2pw%40db", "h8nter2pw"),
    "query-encoded-twice": ("/cb?to=password%253Dh8nter2pw", "h8nter2pw"),
    "form-brackets": ("user[password]=h8nter2pw", "h8nter2pw"),
    "python-repr": ("Login(user='ada', password='h8nter2pw')", "h8nter2pw"),
    "dict-repr": ("{'user': 'ada', 'client_secret': b'h8nter2pw'}", "h8nter2pw"),
    "headers-repr": ("[(b'x-api-key', b'h8nter2pw')]", "h8nter2pw"),
    "header-line": ("GET / HTTP/1.1\r\nCookie: theme=dark; id=h8nter2pw\r\n\r\n", "h8nter2pw"),
    "json": ('{"user": {"refresh_token": "h8nter2pw"}}', "h8nter2pw"),
    "json-container": ('{"credentials": {"user": "ada", "word": "h8nter2pw"}}', "h8nter2pw"),
    "json-escapes": ('{"pass\\u0077ord": "h8nter2pw"}', "h8nter2pw"),
    "json-doubled": ('{"credentials": ["h8nter2pw"], "credentials": null}', "h8nter2pw"),
    "json-in-json": ('{"body": "{\\"password\\": \\"h8nter2pw\\"}"}', "h8nter2pw"),
    "json-cut": ('{"user": "ada", "password": "h8nter2pw', "h8nter2pw"),
    "json-quoted": ('"{\\"password\\": \\"a \\\\\\" h8nter2pw\\"}"', "h8nter2pw"),
    "xml": ("<login><password>h8nter2pw</password></login>", "h8nter2pw"),
    "yaml": ("db:\n  password: h8nter2pw\n", "h8nter2pw"),
    "env": ("export DB_PASSWORD=h8nter2pw", "h8nter2pw"),
    "arrow": ("'password' => 'h8nter2pw'", "h8nter2pw"),
    "subscript": ("headers['X-Api-Key'] = 'h8nter2pw'", "h8nter2pw"),
}


def _names(text):
    return text.split()


SECRET_NAMES = _names("""
    authorization Authorization AUTHORIZATION proxy-authorization Proxy-Authorization cookie Cookie set-cookie
    Set-Cookie
    x-api-key X-API-Key X_API_KEY api_key apiKey ApiKey APIKey api-key apikey api%5Fkey OPENAI_API_KEY password Password
    PASSWORD passwd user_password userPassword newPassword password1 password_confirmation passwordHash pwd passphrase
    secret client_secret clientSecret client-secret SECRET_KEY aws_secret_access_key secret_id webhook_secret token
    access_token accessToken access-token refresh_token id_token csrf_token csrftoken X-CSRF-Token x-auth-token
    session_token credentials credential db_credentials private_key privateKey sessionid PHPSESSID JSESSIONID
    connect.sid
    dsn SENTRY_DSN connection_string jwt assertion client_assertion code_verifier auth X-Amz-Signature sig
    X-Amz-Credential X-Amz-Security-Token http.request.header.authorization headers[authorization] otp cvv
""")

READABLE_NAMES = _names("""
    max_tokens maxTokens tokens_used tokensUsed total_tokens input_tokens output_tokens prompt_tokens completion_tokens
    X-Tokens-Used X-Tokens-Remaining tokens_per_minute token_type tokenType token_count token_budget idempotency_key
    Idempotency-Key monkey keyboard donkey turkey key keys primary_key foreign_key cache_key sort_key public_key author
    authority authenticated passed passenger compass bypass session_id X-Session-ID request_id client_id subject scope
    password_changed_at password_policy has_password_expired secret_name api_key_id api_key_prefix
    authorization_endpoint
    cookie_count tokenizer tokenization secretary next_page_token time_to_first_token cost_per_token status code path
    signal design pinned spin opinion
""")
