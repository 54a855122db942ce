// oidc-provider on loopback: JWT access tokens by client credentials, with keys that a test rotates and retires.
//
//     node provider.mjs <file for the keys> [port]
//
// Prints its port. The keys are kept in the file, so that a provider that was killed comes back as it was. POST:
//
//     /_rotate    a new key for every algorithm signs from now on; the old ones stay published
//     /_retire    only those that sign stay published
//
// and GET /_fetches says how often the metadata and the key set were asked for. It ends when its standard input does.

import { createServer } from 'node:http';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { generateKeyPairSync, randomUUID } from 'node:crypto';
import { Provider } from 'oidc-provider';

const [file, port = '0'] = process.argv.slice(2);
const KINDS = {
  RS256: ['rsa', { modulusLength: 2048 }],
  ES256: ['ec', { namedCurve: 'P-256' }],
  EdDSA: ['ed25519', {}],
};
const fetches = { metadata: 0, keys: 0 };
let keys = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : fresh();
let handler;

function fresh() {
  return Object.entries(KINDS).map(([alg, [type, options]]) => ({
    ...generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' }),
    alg,
    use: 'sig',
    kid: `${alg}-${randomUUID()}`,
  }));
}

// The keys of a running provider never change: a rotation is a new one at the same address, as a deployment is.
function publish(next) {
  keys = next;
  writeFileSync(file, JSON.stringify(keys));
  const provider = new Provider(`http://127.0.0.1:${server.address().port}`, {
    clients: [{
      client_id: 'nightly-job',
      client_secret: 'canary-client-secret-of-the-nightly-job',
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: [],
    }],
    cookies: { keys: [randomUUID()] },
    jwks: { keys },
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true,
        // The resource names the algorithm that its tokens are signed with.
        getResourceServerInfo: (_, resource) => ({
          scope: 'agents:read agents:write',
          audience: 'sigil-api',
          accessTokenFormat: 'jwt',
          accessTokenTTL: 86_400,
          jwt: { sign: { alg: resource.slice('urn:sigil:'.length) } },
        }),
      },
    },
    ttl: { ClientCredentials: (_, token) => token.resourceServer.accessTokenTTL },
  });
  handler = provider.callback();
}

const server = createServer((request, response) => {
  const answer = (body) => {
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify(body));
  };
  switch (request.url) {
    case '/_rotate': publish([...fresh(), ...keys]); return answer(keys.map(({ kid }) => kid));
    case '/_retire': publish(keys.slice(0, Object.keys(KINDS).length)); return answer(keys.map(({ kid }) => kid));
    case '/_fetches': return answer(fetches);
    case '/jwks': fetches.keys += 1; break;
    case '/.well-known/openid-configuration': fetches.metadata += 1; break;
  }
  return handler(request, response);
});

server.listen(Number(port), '127.0.0.1', () => {
  publish(keys);
  console.log(server.address().port);
});
process.stdin.on('end', () => process.exit()).resume();
