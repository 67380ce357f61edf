//! `docs_added` on the real services: a message on the topic, and what it names is found by a search.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use atlas_test_support::{
    fleet::{Fleet, FleetError, FleetOptions, curl_json},
    skip,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_message_on_the_topic_makes_documents_searchable() {
    let repos = tempfile::tempdir().unwrap();
    let shop = repos.path().canonicalize().unwrap().join("shop");
    fs::create_dir_all(shop.join("docs")).unwrap();
    fs::write(shop.join("docs/door.md"), "# Door\n\nThe zebrawood door is locked at nine.\n").unwrap();
    fs::write(shop.join("other.md"), "# Other\n\nNot asked for, though zebrawood is in it.\n").unwrap();
    let options = FleetOptions {
        workers: 1,
        env: vec![
            ("INDEX_ON_DOCS_ADDED".to_owned(), "true".to_owned()),
            ("INDEX_ALLOWED_ROOTS".to_owned(), repos.path().canonicalize().unwrap().display().to_string()),
        ],
        index: None,
        ..FleetOptions::default()
    };
    let fleet = match Fleet::start(options).await {
        Ok(fleet) => fleet,
        Err(FleetError::Missing { service, reason }) => {
            return skip("a_message_on_the_topic_makes_documents_searchable", service, &reason);
        }
        Err(FleetError::Broken(error)) => panic!("{error:#}"),
    };
    let publish = |message: serde_json::Value| {
        let data = BASE64.encode(message.to_string());
        let topic = fleet.emulator_url("topics/docs_added:publish");
        curl_json("POST", &topic, &json!({"messages": [{"data": data}]})).unwrap()
    };
    publish(json!({"repo": "/etc", "path": "passwd"}));
    publish(json!({"repo": shop, "path": "docs"}));
    let found = fleet
        .eventually("the document is found", || async {
            let output = fleet.atlas(&["search", "zebrawood", "--json"]).ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            text.contains("docs/door.md").then_some(text)
        })
        .await
        .unwrap_or_else(|error| panic!("{error:#}\n{}", fleet.logs()));
    assert!(!found.contains("other.md"), "{found}");
    // Nobody reads what was not allowed, and somebody can see that it was asked for.
    let database = fleet.database().await.unwrap();
    fleet
        .eventually("the refused message is kept", || async {
            let query = "select count(*) from dead_letters where reason = 'docs_added_refused'";
            let count: i64 = database.query_one(query, &[]).await.ok()?.get(0);
            (count == 1).then_some(())
        })
        .await
        .unwrap();
}
