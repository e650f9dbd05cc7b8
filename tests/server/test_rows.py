"""Which attack or fault is tried where: each row names its tests, or says why it has none. None may name what is not.

A48 to A55 and F34 to F43 are aimed at the client, A56 to A71 and F43 to F46 at the server.
"""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = {
    "pull": "unit/registry/test_hub_pull.py",
    "push": "unit/registry/test_hub_push.py",
    "tls": "unit/registry/test_hub_tls.py",
    "hostile": "server/test_hostile.py",
    "limits": "server/test_limits.py",
    "restart": "server/test_restart.py",
    "gate": "server/test_gate.py",
    "xet": "server/test_xet.py",
    "canary": "server/test_canary.py",
    "cuts": "crash/client_cuts.py",
    "store": "crash/test_store_torture.py",
    "storm": "crash/server_storm.py",
}
ROWS = {
    # names, ids and hashes from a hub are compared, and are no paths
    "A48": "pull::test_a_wrong_description pull::test_names_of_files_are_never_paths",
    # links are nothing that a hub can list: a file is its name, size and hash
    "A49": "pull::test_a_wrong_description pull::test_names_of_files_are_never_paths "
    "pull::test_what_is_no_adapter_that_may_be_stored",
    "A50": "pull::test_a_wrong_body pull::test_a_wrong_description",
    "A51": "pull::test_a_wrong_description pull::test_what_a_hub_says_is_shown_harmless",
    "A52": "pull::test_cookies_links_and_realms_are_nothing_to_it",
    # plain http to a host that the user named is allowed, as the Hub's own client allows it; a way there is not
    "A53": "tls::test_a_certificate_that_is_not_right tls::test_a_right_one_and_then_no_way_to_plain_text",
    "A54": "pull::test_a_redirect_to_another_host_takes_the_bytes_but_not_the_token "
    "pull::test_cookies_links_and_realms_are_nothing_to_it",
    "A55": "pull::test_what_is_no_adapter_that_may_be_stored",
    "A56": "hostile::test_no_token_that_is_nobodys_gets_in hostile::test_two_tokens_or_one_in_the_query_are_none",
    # there is no request that collects
    "A57": "hostile::test_a_token_does_only_what_its_scopes_say hostile::test_what_a_url_allows_ends "
    "hostile::test_a_revoked_token_stops_at_the_next_request_also_between_upload_and_commit",
    "A58": "hostile::test_no_path_leads_anywhere_but_to_names "
    "hostile::test_no_path_in_a_commit_leads_out_of_a_directory",
    "A59": "hostile::test_no_field_names_a_file_of_the_server",
    "A60": "hostile::test_knowing_a_digest_gives_nobody_the_bytes "
    "restart::test_another_user_does_not_get_it_by_the_restart",
    "A61": "hostile::test_a_body_has_one_length_and_it_is_small_enough limits::test_how_long_a_body_is "
    "hostile::test_an_upload_is_as_long_as_it_said_and_has_the_digest_it_said "
    "hostile::test_limits_of_size_and_quota_are_said_in_json",
    # how long others wait meanwhile is measured by the storm, which has connections that dawdle
    "A62": "limits::test_who_dawdles_is_sent_away limits::test_a_connection_is_not_kept_for_ever "
    "limits::test_headers_have_an_end limits::test_silent_connections_make_room_for_who_asks "
    "limits::test_who_asks_slowly_holds_up_nobody_who_asks hostile::test_pipelined_requests_are_answered_in_order "
    "storm::_dawdle",
    "A63": "hostile::test_one_range_or_the_whole",
    # no upload has an offset: a file comes whole, or in parts that have numbers
    "A64": "restart::test_parts_that_were_sent_are_here xet::test_a_place_takes_only_its_own_token "
    "hostile::test_an_upload_is_as_long_as_it_said_and_has_the_digest_it_said "
    "hostile::test_who_did_not_see_the_head_is_told_and_who_sends_a_commit_twice_gets_one",
    # what a body is, its route says; a Content-Type is not believed, and nothing but a token lets one write
    "A65": "hostile::test_no_list_is_longer_than_a_page hostile::test_a_commit_that_is_none_changes_nothing "
    "hostile::test_a_browser_that_knows_a_password_reads_and_never_writes",
    # no client sends a manifest: the server makes it from the files, and its ids with it
    "A66": "hostile::test_an_upload_is_as_long_as_it_said_and_has_the_digest_it_said "
    "gate::test_an_adapter_is_one_for_loraforge_on_the_machine",
    # the Hub's protocol has no If-Match: a tag is made once, and a commit names its parent or goes on top of the head
    "A67": "hostile::test_who_did_not_see_the_head_is_told_and_who_sends_a_commit_twice_gets_one "
    "limits::test_of_two_who_want_one_tag_one_gets_it",
    "A68": "hostile::test_a_name_that_is_not_ours_is_not_answered "
    "hostile::test_no_other_site_reads_or_shows_what_is_here",
    "A69": "hostile::test_zz_nothing_that_came_out_of_the_server_holds_a_token "
    "canary::test_a_token_that_gets_out_is_found",
    "A70": "hostile::test_it_is_not_reached_from_elsewhere_while_nobody_has_a_token",
    "A71": "hostile::test_links_that_somebody_planted_are_not_followed",
    "F34": "pull::test_cut_off_for_good pull::test_cut_off_once pull::test_cut_off_anywhere pull::test_nobody_there "
    "cuts::main",
    "F35": "pull::test_a_wrong_body pull::test_cut_off_for_good",
    "F36": "pull::test_a_wrong_body pull::test_a_small_file_with_other_bytes pull::test_lies_are_refused",
    "F37": "pull::test_after_a_break_other_bytes_do_not_count_as_the_rest "
    "pull::test_after_a_break_another_part_does_not_count_as_the_rest "
    "pull::test_after_a_break_the_rest_of_another_version_is_refused pull::test_a_wrong_body",
    "F38": "pull::test_how_long_a_hub_may_make_one_wait pull::test_a_short_trouble_is_waited_out",
    "F39": "pull::test_a_wrong_body push::test_a_push_that_was_cut_sends_only_the_rest",
    "F40": "pull::test_redirects_that_are_not_followed pull::test_a_hub_outside_leads_nobody_inside "
    "tls::test_a_right_one_and_then_no_way_to_plain_text "
    "pull::test_a_redirect_to_another_host_takes_the_bytes_but_not_the_token",
    "F41": "pull::test_a_hub_that_stalls pull::test_a_hub_that_trickles pull::test_a_hub_that_trickles_before_a_body",
    "F42": "pull::test_a_file_that_is_listed_and_not_there pull::test_lies_are_refused "
    "pull::test_a_branch_that_moves_meanwhile",
    # the server writes by the store's own steps, and these are broken at every call; the storm kills it at any moment
    "F43": "push::test_a_push_that_breaks_off_at_any_request_is_run_again storm::main store::test_nothing_is_lost",
    "F44": "limits::test_of_two_who_want_one_tag_one_gets_it storm::main",
    "F45": "restart::test_a_file_that_was_sent_is_here restart::test_parts_that_were_sent_are_here "
    "restart::test_a_collection_while_nobody_serves_takes_it_and_it_is_asked_for_again "
    "restart::test_xorbs_that_were_sent_are_here",
    "F46": "limits::test_a_full_disk_is_said_and_harms_nothing "
    "limits::test_who_goes_away_before_the_end_leaves_nothing",
}


def test_every_row_is_here():
    assert set(ROWS) == {*(f"A{n}" for n in range(48, 72)), *(f"F{n}" for n in range(34, 47))}


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_names_is_there(row):
    for name in ROWS[row].split():
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", (TESTS / FILES[file]).read_text(), re.MULTILINE), name
