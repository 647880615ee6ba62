//! Backends in a node's file: what is taken, and how what is not is told.

use std::path::Path;

use super::{Kv, KvBackendKind, RedisAddress};
use crate::invalid::Place;
use crate::node::NodeConfig;

const HEAD: &str = "name = 'a'\nregion = 'b'\nstate_dir = 's'\nlisten = { http = '127.0.0.1:0' }\n";

fn kv(tables: &str) -> Result<Kv, Vec<Place>> {
    let parsed = NodeConfig::parse(Path::new("/etc/selvage/node.toml"), &format!("{HEAD}{tables}"));
    parsed.map(|config| config.kv).map_err(|invalid| invalid.places())
}

#[test]
fn a_store_is_where_the_file_says() {
    let both = "[kv]\nbackend = 'cache'\n\
        [kv.backends.cache]\nkind = 'redis'\nurl = 'rediss://redis.example:6380/2'\npassword_file = 'redis.password'\n\
        [kv.backends.bus]\nkind = 'nats'\nservers = ['tls://n1.example']\ncredentials_file = '/etc/bus.creds'\n\
        [kv.stores.'shop/orders']\nbackend = 'bus'\n[kv.stores.'shop/local']\nbackend = 'mesh'\nmib_max = 5\n";
    let kv = kv(both).unwrap();
    let of = |store: &str| kv.backend_of(&store.parse().unwrap());
    assert_eq!([of("shop/orders"), of("shop/local"), of("other/default")], [Some("bus"), None, Some("cache")]);
    let (cache, bus) = (&kv.backends["cache"], &kv.backends["bus"]);
    assert_eq!((cache.kind, bus.kind), (KvBackendKind::Redis, KvBackendKind::Nats));
    assert_eq!(cache.password_file.as_deref(), Some(Path::new("/etc/selvage/redis.password")));
    assert_eq!((cache.prefix(), bus.bucket(), bus.replicas()), ("selvage", "selvage", 3));
    assert_eq!((cache.connect_ms, cache.request_ms, cache.requests_max), (2_000, 1_000, 128));
    assert_eq!((cache.value_bytes_max(), bus.bucket_bytes_max()), (1_024_000, 1 << 30));
    let address = RedisAddress { is_tls: true, host: "redis.example".into(), port: 6380, database: 2 };
    assert_eq!(cache.redis_address(), Some(address));
    assert_eq!(Kv::default().backend_of(&"a/b".parse().unwrap()), None);
}

#[test]
fn addresses_of_redis_are_read_whole_or_not_at_all() {
    for (url, host, port, database) in [
        ("redis://a", "a", 6379, 0),
        ("redis://a:1/", "a", 1, 0),
        ("redis://127.0.0.1:7/15", "127.0.0.1", 7, 15),
        ("redis://[::1]", "::1", 6379, 0),
        ("redis://[::1]:7/3", "::1", 7, 3),
    ] {
        let read = RedisAddress { is_tls: false, host: host.into(), port, database };
        assert_eq!(RedisAddress::parse(url), Some(read), "{url}");
    }
    for bad in [
        "",
        "a:1",
        "http://a",
        "redis://",
        "redis://:1",
        "redis://a:",
        "redis://a:0",
        "redis://a:65536",
        "redis://a/x",
        "redis://a/-1",
        "redis://a?db=1",
        "redis://[a]",
        "redis://[::1",
        "redis://[::1]7",
        "redis+unix:///s",
    ] {
        assert_eq!(RedisAddress::parse(bad), None, "{bad}");
    }
}

#[test]
fn what_can_not_be_is_told_with_file_line_and_field() {
    const REDIS: &str = "[kv.backends.x]\nkind = 'redis'\nurl = 'redis://a'\n";
    const NATS: &str = "[kv.backends.x]\nkind = 'nats'\nservers = ['nats://a']\n";
    let of = |table: &str, more: &str| format!("{table}{more}\n");
    for (bad, line, field) in [
        ("[kv]\nbackend = 'x'".to_owned(), 6, "kv.backend"),
        ("[kv.stores.'a/b']\nbackend = 'x'".to_owned(), 6, "kv.stores.a/b.backend"),
        ("[kv.backends.x]\nkind = 'etcd'".to_owned(), 6, ""),
        ("[kv.backends.x]\nurl = 'redis://a'".to_owned(), 5, "kind"),
        ("[kv.backends.x]\nkind = 'redis'".to_owned(), 5, "kv.backends.x"),
        ("[kv.backends.x]\nkind = 'nats'".to_owned(), 5, "kv.backends.x"),
        ("[kv.backends.x]\nkind = 'redis'\nurl = 'redis://a/x'".to_owned(), 7, "kv.backends.x.url"),
        ("[kv.backends.x]\nkind = 'nats'\nservers = ['http://a']".to_owned(), 7, "kv.backends.x.servers"),
        ("[kv.backends.mesh]\nkind = 'redis'\nurl = 'redis://a'".to_owned(), 5, "kv.backends.mesh"),
        ("[kv.backends.'a b']\nkind = 'redis'\nurl = 'redis://a'".to_owned(), 5, "kv.backends.a b"),
        (of(REDIS, "bucket = 'b'"), 8, "kv.backends.x.bucket"),
        (of(REDIS, "nkey_file = 'b'"), 8, "kv.backends.x.nkey_file"),
        (of(REDIS, "prefix = 'a:b'"), 8, "kv.backends.x.prefix"),
        (of(REDIS, "user = 'u'"), 8, "kv.backends.x.user"),
        (of(REDIS, "roots = 'ca.pem'"), 8, "kv.backends.x.roots"),
        (of(REDIS, "request_ms = 9"), 8, "kv.backends.x.request_ms"),
        (of(REDIS, "connect_ms = 60001"), 8, "kv.backends.x.connect_ms"),
        (of(REDIS, "requests_max = 0"), 8, "kv.backends.x.requests_max"),
        (of(REDIS, "value_kib_max = 25601"), 8, "kv.backends.x.value_kib_max"),
        (of(REDIS, "password = 'p'"), 8, "password"),
        (of(REDIS, "[kv.stores.'a/b']\nbackend = 'x'\nmib_max = 1"), 10, "kv.stores.a/b.mib_max"),
        (of(NATS, "url = 'redis://a'"), 8, "kv.backends.x.url"),
        (of(NATS, "bucket = 'a.b'"), 8, "kv.backends.x.bucket"),
        (of(NATS, "replicas = 2"), 8, "kv.backends.x.replicas"),
        (of(NATS, "bucket_mib_max = 0"), 8, "kv.backends.x.bucket_mib_max"),
        (of(NATS, "password_file = 'p'"), 8, "kv.backends.x.password_file"),
        (of(NATS, "token_file = 't'\nnkey_file = 'n'"), 5, "kv.backends.x"),
    ] {
        let places = kv(&bad).unwrap_err();
        assert_eq!(places[0].file, "/etc/selvage/node.toml");
        assert_eq!((places[0].line, places[0].field.as_str()), (Some(line), field), "{bad}: {places:?}");
        assert_eq!(places.len(), 1, "{bad}: {places:?}");
    }
}

#[test]
fn a_secret_in_an_address_is_refused_and_not_shown() {
    for bad in [
        "[kv.backends.x]\nkind = 'redis'\nurl = 'redis://:hunter2@a'\n",
        "[kv.backends.x]\nkind = 'nats'\nservers = ['nats://u:hunter2@a']\n",
    ] {
        let text = format!("{HEAD}{bad}");
        let invalid = NodeConfig::parse(Path::new("node.toml"), &text).unwrap_err();
        let mut shown = String::new();
        miette::GraphicalReportHandler::new_themed(miette::GraphicalTheme::none())
            .with_context_lines(9)
            .render_report(&mut shown, &invalid)
            .unwrap();
        assert!(shown.contains("holds no secrets") && !shown.contains("hunter2"), "{shown}");
    }
}
