//! What only Supabase can get wrong: keys, privileges, missing migrations, wrong addresses.

use std::time::Duration;

use atlas_shared::{UpstreamError, ledger::LedgerError, postgrest::RpcClient};
use atlas_test_support::{skip, supabase::Supabase};
use atlas_worker::store::RunStore as _;
use serde_json::{Value, json};

use crate::harness::{AMPLE, Harness, supabase_store};

/// The functions that make the port; everything else of ours is internal.
const RPC: &[&str] = &[
    "budget_history",
    "budget_today",
    "cancel_run",
    "cancelled_runs",
    "change_fleet",
    "claim_due",
    "claim_index_job",
    "claim_run",
    "close_reservation",
    "defer_run",
    "finish_run",
    "fleet_state",
    "get_dead_letter",
    "get_index_job",
    "get_run",
    "list_dead_letters",
    "list_runs",
    "mark_replayed",
    "outbox_mark_sent",
    "outbox_take",
    "purge_dead_letters",
    "purge_old",
    "record_dead_letter",
    "release_run",
    "renew_lease",
    "report_index_job",
    "reserve_tokens",
    "settle_step",
    "store_check",
    "submit_index_job",
    "wake_run",
];

const TABLES: &[&str] = &[
    "architect_in",
    "architect_out",
    "dead_letters",
    "early_cancels",
    "fleet_settings",
    "index_jobs",
    "outbox",
    "processed_msgs",
    "run_steps",
    "runs",
    "token_days",
    "token_ledger",
];

fn variable(error: &UpstreamError) -> &'static str {
    match error {
        UpstreamError::Misconfigured { variable, .. } => variable,
        other => panic!("not a fault of the configuration: {other}"),
    }
}

#[tokio::test]
async fn anon_and_authenticated_may_read_nothing_and_do_nothing() {
    let Some(h) = Harness::supabase("anon_and_authenticated_may_read_nothing_and_do_nothing").await else {
        return;
    };
    let run = h.claim_new().await;
    let http = reqwest::Client::new();
    let project = h.project();
    let callers = [
        ("no key", None),
        ("anon", Some(&project.anon_key)),
        ("authenticated", Some(&project.authenticated_key)),
    ];
    for (caller, key) in callers {
        let with_key = |request: reqwest::RequestBuilder| match key {
            Some(key) => request.header("apikey", key).bearer_auth(key),
            None => request,
        };
        for function in RPC {
            let url = format!("{}/rest/v1/rpc/{function}", project.url);
            let args =
                json!({"args": {"task_id": run.lease.task_id, "attempt": 1, "limit": 1, "limits": AMPLE}});
            let answer = with_key(http.post(url)).json(&args).send().await.unwrap();
            assert!(
                matches!(answer.status().as_u16(), 401 | 403 | 404),
                "{caller} called {function}: {answer:?}"
            );
        }
        for table in TABLES {
            let url = format!("{}/rest/v1/{table}", project.url);
            let row = json!({"id": run.lease.task_id, "data": {}, "task_id": run.lease.task_id});
            for request in [
                http.get(&url),
                http.post(&url).json(&row),
                http.patch(format!("{url}?task_id=eq.{}", run.lease.task_id))
                    .json(&json!({"status": "done"})),
                http.delete(format!("{url}?task_id=eq.{}", run.lease.task_id)),
            ] {
                let answer = with_key(request).send().await.unwrap();
                let status = answer.status();
                let text = answer.text().await.unwrap();
                assert!(
                    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 405),
                    "{caller} reached {table}: {status} {text}"
                );
                assert!(!text.contains("worker-1"), "{caller} read {table}: {text}");
            }
        }
    }
    assert!(h.store.renew_lease(&run.lease, Duration::from_secs(5)).await.unwrap().held);
}

#[tokio::test]
async fn privileges_are_exactly_what_the_port_needs() {
    let Some(h) = Harness::supabase("privileges_are_exactly_what_the_port_needs").await else { return };
    let functions = h
        .sql()
        .query(
            "select p.proname::text, p.prosecdef, coalesce(array_to_string(p.proconfig, ' '), ''), r.role,
                    has_function_privilege(r.role, p.oid, 'execute')
               from pg_proc as p cross join unnest(array['anon', 'authenticated', 'service_role']) as r (role)
              where p.pronamespace = 'public'::regnamespace",
            &[],
        )
        .await
        .unwrap();
    let mut seen = Vec::new();
    for row in &functions {
        let (name, definer, config): (String, bool, String) = (row.get(0), row.get(1), row.get(2));
        let (role, may): (String, bool) = (row.get(3), row.get(4));
        let is_rpc = RPC.contains(&name.as_str());
        assert_eq!(may, is_rpc && role == "service_role", "{role} and {name}");
        assert_eq!(definer, is_rpc, "{name}");
        if is_rpc {
            assert!(config.contains("search_path=\"\""), "{name}: {config}");
            seen.push(name);
        } else {
            assert!(name.starts_with("atlas_"), "{name} is neither a call of the port nor internal");
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen, RPC);

    let tables = h
        .sql()
        .query(
            "select c.relname::text, c.relkind::text, c.relrowsecurity, r.role, p.privilege,
                    has_table_privilege(r.role, c.oid, p.privilege)
               from pg_class as c
                    cross join unnest(array['anon', 'authenticated', 'service_role']) as r (role)
                    cross join unnest(array['select', 'insert', 'update', 'delete', 'truncate']) as p (privilege)
              where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v')",
            &[],
        )
        .await
        .unwrap();
    for row in &tables {
        let (name, kind, secured): (String, String, bool) = (row.get(0), row.get(1), row.get(2));
        let (role, privilege, may): (String, String, bool) = (row.get(3), row.get(4), row.get(5));
        assert!(TABLES.contains(&name.as_str()), "{name}");
        assert!(secured || kind == "v", "row level security is off on {name}");
        assert_eq!(may, role == "service_role" && privilege == "select", "{role} {privilege} {name}");
    }
}

#[tokio::test]
async fn service_role_reads_results_and_writes_nothing() {
    let Some(h) = Harness::supabase("service_role_reads_results_and_writes_nothing").await else { return };
    let run = h.claim_new().await;
    let task = run.lease.task_id;
    h.store.finish_run(run.lease, &crate::harness::done(task)).await.unwrap();
    let project = h.project();
    let key = &project.service_role_key;
    let http = reqwest::Client::new();
    let url = format!("{}/rest/v1/architect_out?id=eq.{task}", project.url);

    let rows: Value =
        http.get(&url).header("apikey", key).bearer_auth(key).send().await.unwrap().json().await.unwrap();
    assert_eq!(rows[0]["data"]["content"], "# A queue");
    let refused = http.delete(&url).header("apikey", key).bearer_auth(key).send().await.unwrap();
    assert!(matches!(refused.status().as_u16(), 401 | 403), "{refused:?}");
    let published = h
        .sql()
        .query_one("select array_agg(tablename::text order by 1) from pg_publication_tables where pubname = 'architect_bus'", &[])
        .await
        .unwrap();
    assert_eq!(published.get::<_, Vec<String>>(0), ["architect_in", "architect_out"]);
}

#[tokio::test]
async fn a_wrong_key_names_its_variable() {
    let Some(h) = Harness::supabase("a_wrong_key_names_its_variable").await else { return };
    let project = h.project();
    let forged =
        atlas_test_support::supabase::sign_key("another-secret-that-is-not-this-projects", "service_role");
    for key in [&project.anon_key, &project.authenticated_key, &forged, &"not-a-jwt".to_owned()] {
        let error = supabase_store(&project.url, key).check().await.unwrap_err();
        assert_eq!(variable(&error), "SUPABASE_SERVICE_ROLE_KEY", "{error}");
        assert!(!error.to_string().contains(key.as_str()), "the key itself is in the message");
    }
}

#[tokio::test]
async fn missing_tables_say_to_migrate() {
    let test = "missing_tables_say_to_migrate";
    let project = match Supabase::start_without_migrations().await {
        Ok(project) => project,
        Err(reason) => return skip(test, "Postgres", &reason),
    };
    let error = supabase_store(&project.url, &project.service_role_key).check().await.unwrap_err();
    assert_eq!(variable(&error), "SUPABASE_URL");
    assert!(error.to_string().contains("atlas migrate up"), "{error}");
}

#[tokio::test]
async fn an_unreachable_server_is_transient_and_a_wrong_one_names_its_variable() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = supabase_store(&format!("http://{closed}"), "key").check().await.unwrap_err();
    assert!(error.is_transient(), "{error}");

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let website = axum::Router::new().fallback(|| async { axum::response::Html("<h1>Hello</h1>") });
    tokio::spawn(async move { axum::serve(listener, website).await });
    let error = supabase_store(&url, "key").check().await.unwrap_err();
    assert_eq!(variable(&error), "SUPABASE_URL", "{error}");
}

#[tokio::test]
async fn a_server_that_hangs_is_given_up_on() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let client = RpcClient::new(&atlas_shared::config::SupabaseConfig {
        url,
        service_role_key: atlas_shared::Secret::new("key"),
        timeout: Duration::from_millis(100),
    })
    .unwrap();
    let error = LedgerError::from(client.call::<_, Value>("store_check", &json!({})).await.unwrap_err());
    assert!(matches!(&error, LedgerError::Upstream(error) if error.is_transient()), "{error}");
}
